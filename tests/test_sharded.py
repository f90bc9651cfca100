"""A model spread over processes (FSDP2, on gloo): each recipe trains as in one process, a run goes
on with another number of processes, each keeps its part of the weights, and experiments use it."""

import json
from pathlib import Path

import pytest
import torch
from conftest import forkserver, random_sae, tiny
from device_entries import model_folder, text_file
from safetensors.torch import load_file
from several import Killed, together
from worlds import ROWS

from sae_lora.results import Results, rows_path

LOADED = ["sae_lora.experiments", "sae_lora.grid", "sae_lens", "peft", "transformers", "accelerate"]
STEPS = 8
RUNS = {
    "fast": dict(layers="after", recipe="fast", precision="fp32"),
    "fast, all layers": dict(layers="all", recipe="fast", precision="fp32"),
    "fast, keeping the unspliced": dict(
        layers="after", recipe="fast", precision="fp32", keep_unspliced=0.5
    ),
    "published": dict(layers="all", recipe="published"),
}


@pytest.fixture(scope="module")
def forks():
    "Where processes that have imported all come from."
    return forkserver(LOADED)


def own_bytes(lm) -> int:
    "Bytes of the blocks' weights that this process keeps."
    from sae_lora.lm import decoder_blocks

    parts = [getattr(p, "to_local", lambda p=p: p)() for p in decoder_blocks(lm).parameters()]
    return sum(p.numel() * p.element_size() for p in parts)


def train(folder: Path, run: dict, dies_at: int | None):
    "Train two adapters in one pass, over as many processes as there are."
    from sae_lora.lm import shard
    from sae_lora.lora import add_lora, lora_parameters
    from sae_lora.processes import leads, processes
    from sae_lora.train import fit_loras

    run = dict(run)
    layers = run.pop("layers")
    lm, saes = tiny("llama"), {1: random_sae()}
    whole = own_bytes(lm)
    if processes():
        shard(lm)
        share = own_bytes(lm) / whole
        assert abs(share - 1 / processes().num_processes) < 0.05, share
    for rank in (2, 3):
        add_lora(lm, saes, rank=rank, layers=layers, name=f"r{rank}")

    def seen(row: dict):
        if row["step"] == dies_at:
            raise Killed

    students = {f"r{rank}": saes for rank in (2, 3)}
    kept = folder / "state.safetensors"
    tokens = STEPS * 4 * ROWS.shape[-1]
    rest = dict(batch=4, lr=1e-2, points=STEPS, checkpoint=kept, callback=seen)
    curves = fit_loras(lm, students, ROWS, tokens, **run, **rest)
    if leads():
        params = {n: p for name in students for n, p in lora_parameters(lm, name).items()}
        torch.save({n: p.detach().clone() for n, p in params.items()}, folder / "end.pt")
        (folder / "curves.json").write_text(json.dumps(curves))


def ended(folder: Path) -> tuple[dict, torch.Tensor]:
    "The parameters of a run at its end, and its losses."
    curves = json.loads((folder / "curves.json").read_text())
    losses = []
    for curve in curves.values():
        losses.append([row["loss"] for row in curve])
    return torch.load(folder / "end.pt", weights_only=True), torch.tensor(losses)


def same(one: Path, other: Path):
    (a, before), (b, after) = ended(one), ended(other)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-5)
    assert a.keys() == b.keys() and any(p.abs().max() > 0 for p in a.values())
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_any_number_of_processes_trains_as_one_and_goes_on_as_another(forks, tmp_path, name):
    run, places = RUNS[name], {}
    for number in (1, 2, 4):
        places[number] = tmp_path / f"{number}"
        places[number].mkdir()
    together(forks, 1, train, places[1], run, None)
    for number, then in ((2, 4), (4, 2)):  # the one dies halfway, the other goes on
        together(forks, number, train, places[number], run, STEPS // 2)
        assert not (places[number] / "end.pt").exists()
        assert load_file(places[number] / "state.safetensors")
        together(forks, then, train, places[number], run, None)
        same(places[1], places[number])


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> list[dict]:
    "Four rows: two seeds of two ranks each, on an SAE that is there."
    from sae_lora.sae import save_sae

    sae = random_sae()
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    save_sae(sae, tmp_path_factory.mktemp("sae") / "sae")
    world = dict(model=str(model_folder()), text=str(text_file()), length=16)
    world |= dict(text_tokens=24 * 16, valid_tokens=256)
    run = world | dict(layers="after", tokens=1024, recipe="fast", keep_unspliced=0.1)
    run["sae"] = str(tmp_path_factory.getbasetemp() / "sae0" / "sae")
    return [run | dict(seed=s, rank=r) for s in (0, 1) for r in (1, 2)]


def compute(asked: list[dict]):
    "Compute what rows are missing."
    from sae_lora.experiments import adapted_rows, sae_steps
    from sae_lora.grid import rows_of

    rows_of("tiny", asked, adapted_rows, sae_steps)


def refused(asked: list[dict]):
    "Ask for an SAE that is yet to be trained."
    from sae_lora.files import UsageError

    spec = dict(layer=1, width=64, k=8, tokens=1024)
    with pytest.raises(UsageError, match="without torchrun"):
        compute([p | dict(sae=spec) for p in asked[:1]])


def measured_alike(one: dict, other: dict):
    for measure in ("ce", "kl"):
        assert one[measure].keys() == other[measure].keys()
        for model, value in one[measure].items():
            assert abs(value - other[measure][model]) < 1e-4, (measure, model)


def test_an_experiment_of_several_processes_has_the_rows_of_one(
    forks, asked, tmp_path, monkeypatch
):
    found = {}
    for number in (1, 2, 4):  # four cannot share a step's two rows, and compute both
        folder = tmp_path / f"{number}"
        own = dict(SAE_LORA_CACHE=str(folder / "cache"), SAE_LORA_RESULTS=str(folder / "rows"))
        together(forks, number, compute, asked, **own)
        together(forks, number, compute, asked, **own)  # which finds all of them there
        monkeypatch.setenv("SAE_LORA_RESULTS", own["SAE_LORA_RESULTS"])
        found[number] = Results(rows_path("tiny")).rows()
    for number in (2, 4):
        assert len(found[1]) == len(found[number]) == len(asked)
        for key, row in found[1].items():
            measured_alike(row["metrics"], found[number][key]["metrics"])
    together(forks, 2, refused, asked, **own)
