"""Training: side by side as alone, from the cache as computed, several processes as one."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import forkserver, random_sae, tiny
from several import together
from worlds import ROWS, RUN, trained

from sae_lora.checkpoint import Checkpoint
from sae_lora.files import Stopped, UsageError
from sae_lora.lm import decoder_blocks, shard
from sae_lora.loop import Descent, Watch, loop
from sae_lora.lora import add_lora, lora_parameters
from sae_lora.metrics import fidelities, fidelity
from sae_lora.processes import leads, processes
from sae_lora.train import LONG, fit_lora, fit_loras, fuses


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_adapters_trained_side_by_side_end_as_if_alone(architecture):
    lm, saes = tiny(architecture), {1: random_sae()}
    ranks, alone = (1, 3, 4), {}
    for r in ranks:
        add_lora(lm, saes, rank=r)
        fit_lora(lm, saes, ROWS, **RUN)
        alone[r] = trained(lm), fidelity(lm, saes, ROWS)
        lm.delete_adapter("default")
    names = dict(zip(ranks, ("run1", "run10", "lora_x")))  # one begins like another
    for r, name in names.items():
        add_lora(lm, saes, rank=r, name=name)
    curves = fit_loras(lm, {name: saes for name in names.values()}, ROWS, **RUN)
    measured = fidelities(lm, saes, ROWS, list(names.values()))
    for r, name in names.items():
        together = trained(lm, name)
        assert together.keys() == alone[r][0].keys() and any(
            p.abs().sum() > 0 for n, p in together.items() if "lora_B" in n
        )
        for n, p in together.items():
            assert torch.equal(p, alone[r][0][n]), n
        assert measured[name] == alone[r][1]
    assert len({c[-1]["loss"] for c in curves.values()}) == len(ranks)


def test_adapters_for_several_saes_of_one_layer_side_by_side():
    lm, alone = tiny("llama"), {}
    saes = {f"s{i}": {1: random_sae(seed=i)} for i in range(2)}
    for name, own in saes.items():
        add_lora(lm, own, rank=2)
        fit_lora(lm, own, ROWS, **RUN)
        alone[name] = trained(lm)
        lm.delete_adapter("default")
    for name, own in saes.items():
        add_lora(lm, own, rank=2, name=name)
    fit_loras(lm, saes, ROWS, **RUN)
    for name in saes:
        for n, p in trained(lm, name).items():
            assert torch.equal(p, alone[name][n]), n


@pytest.mark.parametrize(
    "option", [dict(precision="bfloat16"), dict(fuse="yes"), dict(decay="steps"), dict(keep="all")]
)
def test_a_word_that_means_nothing_is_refused_before_anything_is_computed(option):
    lm, saes = tiny("llama"), {1: random_sae()}
    add_lora(lm, saes, rank=2)
    (name,) = option
    with pytest.raises(UsageError, match=f"{name} .*; give one of"):
        fit_lora(lm, saes, ROWS, **RUN | option)


def test_a_stop_writes_down_no_loss_that_is_no_number(tmp_path):
    x, file = torch.nn.Parameter(torch.ones(3)), tmp_path / "state.safetensors"

    def losses_of(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        yield x.square().sum() * (math.nan if step == 3 else 1)

    run = [dict(x=x)], 8, 1, Descent(lr=1e-3), Checkpoint(file, {}), Watch(points=1)
    with pytest.raises(UsageError, match="the loss is nan at step 3; start anew"):
        loop(losses_of, *run)
    assert not file.exists()


def test_a_run_goes_on_with_the_adapter_it_had_whatever_else_is_on_the_model(tmp_path):
    lm, saes = tiny("llama"), {1: random_sae()}
    file = tmp_path / "state.safetensors"
    add_lora(lm, saes, rank=2)
    fit_lora(lm, saes, ROWS, **RUN, checkpoint=file)
    add_lora(lm, saes, rank=2, name="other", alpha=7)
    lm.set_adapter("default")
    fit_loras(lm, {"default": saes}, ROWS, **RUN, checkpoint=file)
    lm.delete_adapter("other")
    lm.delete_adapter("default")
    add_lora(lm, saes, rank=2, alpha=8)
    with pytest.raises(UsageError, match="adapters="):
        fit_lora(lm, saes, ROWS, **RUN, checkpoint=file)


@pytest.mark.parametrize("stopped_after", [2, 6])  # before the mean begins, and within it
def test_a_mean_goes_on_where_it_was(tmp_path, stopped_after):
    lm, saes = tiny("llama"), {1: random_sae()}

    def stop(row):
        if row["step"] == stopped_after:
            os.kill(os.getpid(), signal.SIGINT)

    def run(seed=0, **options):
        add_lora(lm, saes, rank=2, seed=seed)
        try:
            options |= dict(decay="constant", average=0.5)
            fit_lora(lm, saes, ROWS, 8 * 16, batch=1, points=8, **options)
            return {n: p.detach().clone() for n, p in lora_parameters(lm).items()}
        finally:
            lm.delete_adapter("default")

    whole, file = run(), tmp_path / "state.safetensors"
    with pytest.raises(Stopped):
        run(checkpoint=file, callback=stop)
    resumed = run(seed=7, checkpoint=file)
    for name, p in whole.items():
        assert torch.equal(p, resumed[name]), name


def test_a_callback_is_called_as_it_was_given():
    class Counts:
        rows = 0

        def __call__(self, row):
            self.rows += 1

        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    lm, saes = tiny("llama"), {1: random_sae()}
    counts = Counts()
    add_lora(lm, saes, rank=2)
    curve = fit_lora(lm, saes, ROWS, **RUN, callback=counts)
    assert counts.rows == len(curve)


def test_an_adapter_that_is_not_there_is_named():
    lm, saes = tiny("llama"), {1: random_sae()}
    add_lora(lm, saes, rank=2)
    with pytest.raises(UsageError, match="'other'"):
        fit_loras(lm, {"default": saes, "other": saes}, ROWS)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_prefix_and_teacher_from_the_cache_are_the_computed_ones(
    architecture, tmp_path, monkeypatch
):
    monkeypatch.setenv("SAE_LORA_CACHE", str(tmp_path))
    lm, saes = tiny(architecture), {1: random_sae()}
    ends = []
    # The second run fills the cache, the third finds it full; two epochs, two adapters at once.
    for cached in (False, True, True):
        for r in (2, 3):
            add_lora(lm, saes, rank=r, name=f"r{r}")
        fit_loras(
            lm,
            {f"r{r}": saes for r in (2, 3)},
            ROWS,
            **RUN | dict(tokens=2 * ROWS.numel()),
            cached=cached,
        )
        ends.append([trained(lm, f"r{r}") for r in (2, 3)])
        for r in (2, 3):
            lm.delete_adapter(f"r{r}")
    assert len([*tmp_path.rglob("*.both")]) == 1
    for a, b, c in zip(*ends):
        for n in a:
            torch.testing.assert_close(a[n], b[n], rtol=1e-3, atol=1e-4)
            assert torch.equal(b[n], c[n]), n
    add_lora(lm, saes, rank=2)
    with pytest.raises(UsageError, match="cached=True"):
        fit_lora(lm, saes, ROWS, 64, "published", cached=True)


@pytest.fixture(scope="module")
def forks():
    "Where processes that have imported all come from."
    return forkserver(["sae_lora.train", "sae_lens", "peft", "transformers", "accelerate"])


def train_shared(file: Path, padded: bool, spread: bool):
    "Train an adapter over as many processes as there are; the one that leads writes what came."
    lm, saes = tiny("llama"), {1: random_sae()}
    rows = ROWS.clone()
    if padded:
        rows[::3, 9:] = -1
    whole = sum(p.numel() for p in decoder_blocks(lm).parameters())
    if spread and processes():
        shard(lm)
        assert sum(p.to_local().numel() for p in decoder_blocks(lm).parameters()) < 0.6 * whole
    add_lora(lm, saes, rank=2)
    own = dict(average=0.5) if spread else {}
    curve = fit_lora(lm, saes, rows, tokens=16 * 16, batch=4, precision="fp32", **own)
    if leads():
        told = dict(processes=processes().num_processes if processes() else 1)
        told["losses"] = [row["loss"] for row in curve]
        told["adapter"] = {n: p.tolist() for n, p in lora_parameters(lm).items() if "lora_B" in n}
        file.write_text(json.dumps(told))


@pytest.mark.parametrize(("padded", "spread"), [(False, False), (True, False), (False, True)])
def test_two_processes_train_as_one(forks, tmp_path, padded, spread):
    found = []
    for number in (1, 2):
        file = tmp_path / f"{number}.json"
        together(forks, number, train_shared, file, padded, spread)
        found.append(json.loads(file.read_text()))
    one, two = found
    assert [one["processes"], two["processes"]] == [1, 2]
    losses = [torch.tensor(run["losses"]) for run in found]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
    for name, p in one["adapter"].items():
        twin = torch.tensor(two["adapter"][name])
        torch.testing.assert_close(torch.tensor(p), twin, rtol=1e-3, atol=1e-4)


def test_which_runs_have_fused_kernels():
    lm = tiny("llama")
    long = LONG["cpu"]
    assert (
        fuses(lm, long)
        and not fuses(lm, long - 1)
        and not fuses(lm, long, dict(recipe="published"))
    )
    assert fuses(lm, 1, dict(fuse=True)) and not fuses(lm, long, dict(fuse=False))
