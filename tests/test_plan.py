"""What a run needs, counted, is what it does; what an experiment asks for is what it computes."""

import json
from unittest.mock import patch

import pytest
import torch
from conftest import random_sae, tiny
from torch.utils.flop_counter import FlopCounterMode
from worlds import ROWS

from sae_lora import cli
from sae_lora.asked import groups_of, places_of, trained_by
from sae_lora.counted import (
    Group,
    SAESize,
    duration,
    known_shape,
    memory,
    operations,
    place_of,
    shape_of,
    skeleton,
)
from sae_lora.files import UsageError
from sae_lora.lm import head
from sae_lora.lora import add_lora, lora_parameters
from sae_lora.notebooks import experiments, has_size
from sae_lora.objective import Objective, distill_each, published_each
from sae_lora.plan import compared, cost_of, efficiency, laptop_rate, plan
from sae_lora.results import Results, key, rows_path

LAPTOP = ("02_sparsity", "03_width", "05_model_size", "06_one_layer", "07_many_saes")


def counted(lm, recipe: str, layers, ranks, at: tuple) -> float:
    "Operations a token that PyTorch counts in a step, but for those between positions."
    saes, batch = {i: random_sae("standard") for i in at}, {"input_ids": ROWS[:2]}
    students = {f"r{r}": saes for r in ranks}
    for r in ranks:
        add_lora(lm, saes, r, layers, name=f"r{r}")
    for p in lora_parameters(lm).values():
        p.requires_grad_(True)
    W = head(lm)
    losses = published_each if recipe == "published" else distill_each
    with FlopCounterMode(display=False) as counter:
        for loss in losses(lm, students, Objective(W), batch):
            loss.backward()
    found = counter.get_flop_counts()["Global"]
    between = sum(n for op, n in found.items() if "bmm" in str(op) or "attention" in str(op))
    return (sum(found.values()) - between) / batch["input_ids"].numel()


@pytest.mark.parametrize("recipe", ["fast", "published"])
@pytest.mark.parametrize(
    "layers, ranks, at",
    [("after", (4,), (1,)), ([3], (2, 4), (1,)), ("all", (4,), (1,)), ("after", (4,), (0, 1, 2))],
)
def test_operations_are_those_of_a_step(recipe, layers, ranks, at):
    lm = tiny("llama")
    shape, places = shape_of(lm), [SAESize(i, 64, False) for i in at]
    found = counted(lm, recipe, layers, ranks, at)
    asked = operations(shape, places, Group(layers, ranks, recipe))
    assert asked == pytest.approx(found, rel=0.04)


def test_a_skeleton_has_the_shape_of_the_model():
    from sae_lora.lm import load_lm

    lm, _ = load_lm("smollm2-135m")
    assert shape_of(lm) == known_shape("smollm2-135m")
    assert all(p.device.type == "meta" for p in skeleton("smollm2-135m").parameters())


@pytest.mark.parametrize("name", ["gemma-2-2b", "gemma-2-9b", "gemma-2-27b"])
def test_sizes_are_those_in_the_names(name):
    billions = {"2b": 2.6, "9b": 9.2, "27b": 27.2}[name.rpartition("-")[2]]
    assert known_shape(f"google/{name}").parameters / 1e9 == pytest.approx(billions, rel=0.02)


def test_what_is_not_known_is_told():
    with pytest.raises(UsageError, match="configuration is not to be had"):
        known_shape("someone/unknown")
    with pytest.raises(UsageError, match="does not say its size"):
        place_of("some-release:some-id", 64)


def test_memory_grows_with_ranks_and_with_the_published_logits():
    shape, place = known_shape("google/gemma-2-2b"), [SAESize(12, 16384, False)]
    few = memory(shape, place, Group("after", (64,)), 1, 1024)
    assert few < memory(shape, place, Group("after", (64, 256)), 1, 1024)
    assert few < memory(shape, place, Group("after", (64,), "published"), 1, 1024)


@pytest.mark.parametrize("name", LAPTOP)
def test_an_experiment_asks_for_the_rows_that_it_has(name):
    asked = {key(p) for group in groups_of(name) for p in group}
    assert asked == Results(rows_path(name)).rows().keys()


@pytest.mark.parametrize("size", ["smoke", "laptop", "gpu", "paper"])
@pytest.mark.parametrize("name", experiments())
def test_every_size_is_planned(name, size):
    if not has_size(name, size):
        pytest.skip(f"{name} has no size {size}")
    groups = groups_of(name, size)
    assert groups and all(places_of(group[0]) for group in groups)
    assert cost_of(groups, set()).adapters > 0
    for p, *_ in groups:
        what = trained_by(p, places_of(p))
        assert what is None or what["tokens"] > 0


@pytest.mark.parametrize("name", LAPTOP)
def test_plans_come_close_to_what_was_measured(name):
    assert compared(name)["ratio"] == pytest.approx(1, abs=0.3)


def test_size_gpu_takes_a_night():
    names = [n for n in experiments() if has_size(n, "gpu")]
    everything = plan(names, "gpu", 4e14)[-1]
    assert everything["hours"] <= 8 and everything["memory"] < 80e9
    assert 0 < efficiency()["saes"] < 1 and laptop_rate() > 0


def test_the_command_gives_json(capsys):
    with patch("sys.argv", ["sae-lora", "plan", "02_sparsity", "--rate", "1e12", "--json"]):
        with pytest.raises(SystemExit) as stop:
            cli.main()
    found = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0 and found["plan"][0]["rows"] == 25
    assert torch.tensor(found["plan"][0]["hours"]) > 0


def test_a_size_of_no_known_name_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sae-lora", "plan", "--size", "huge", "--rate", "1e12"])
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == 2 and "size 'huge'; give one of smoke" in capsys.readouterr().err


def test_a_time_is_told_as_one_would_say_it():
    times = [duration(s) for s in (5, 89, 600, 7200, 3600 * 99.6, 3600 * 12_345)]
    assert times == [
        "5 seconds",
        "89 seconds",
        "10 minutes",
        "2 hours",
        "100 hours",
        "12,345 hours",
    ]
