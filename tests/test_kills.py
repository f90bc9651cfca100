"""An experiment whose process is killed at any moment, and started again, comes to the same rows.

Its SAE, its adapters and their rows are each made in steps that are written down; so what a kill
costs is the time since the last of these. `$SAE_LORA_KILLS` sets how many kills are tried.
"""

import os
import random
import time
from pathlib import Path

import pytest
import torch
from conftest import forkserver
from device_entries import model_folder, text_file

from sae_lora.results import Results, rows_path

KILLS = int(os.environ.get("SAE_LORA_KILLS", 6))
PATIENCE = 300.0  # seconds that a run may take on a busy machine
LOADED = ["sae_lora.grid", "sae_lora.experiments", "sae_lens", "peft", "transformers"]
OF_TIME = {"train_seconds", "sae_seconds", "tokens_per_second"}


@pytest.fixture(scope="module")
def forks():
    "Where processes that have imported all come from."
    context = forkserver(LOADED)
    first = context.Process(target=time.sleep, args=(0,))  # the imports are not timed
    first.start()
    first.join()
    return context


@pytest.fixture(scope="module")
def asked() -> list[dict]:
    "Four rows: two seeds of two ranks each, on one SAE that has to be trained."
    world = dict(model=str(model_folder()), text=str(text_file()), length=16)
    world |= dict(text_tokens=24 * 16, valid_tokens=256)
    spec = dict(layer=1, width=64, k=8, tokens=8192)
    run = world | dict(layers="after", tokens=1024, recipe="fast", sae=spec)
    return [run | dict(seed=s, rank=r) for s in (0, 1) for r in (1, 2)]


def compute(asked: list[dict], folder: Path):
    "Be the process of an experiment, whose cache and rows are in `folder`."
    os.environ |= dict(SAE_LORA_CACHE=str(folder / "cache"), SAE_LORA_RESULTS=str(folder / "rows"))
    from sae_lora.experiments import adapted_rows, sae_steps
    from sae_lora.grid import rows_of

    torch.set_num_threads(1)
    rows_of("tiny", asked, adapted_rows, sae_steps)


def started(forks, asked: list[dict], folder: Path):
    process = forks.Process(target=compute, args=(asked, folder))
    process.start()
    return process


def measured(folder: Path, monkeypatch) -> dict:
    "The numbers of each row by its key, times apart."
    monkeypatch.setenv("SAE_LORA_RESULTS", str(folder / "rows"))
    found = {}
    for key, row in Results(rows_path("tiny")).rows().items():
        found[key] = {k: v for k, v in row["metrics"].items() if k not in OF_TIME}
    return found


def test_a_run_that_is_killed_at_any_moment_comes_to_the_same_rows(
    forks, asked, tmp_path, monkeypatch
):
    began = time.monotonic()
    whole = started(forks, asked, tmp_path / "whole")
    whole.join(PATIENCE)
    assert whole.exitcode == 0
    seconds = time.monotonic() - began
    chance, left = random.Random(0), KILLS
    for attempt in range(2 * KILLS):
        folder, killed = tmp_path / f"killed{attempt}", True
        while killed:
            process = started(forks, asked, folder)
            process.join(chance.uniform(0, seconds) if left else PATIENCE)
            if killed := process.exitcode is None:
                assert left, f"not done in {PATIENCE} s"
                process.kill()
                process.join()
                left -= 1
        assert process.exitcode == 0
        assert measured(folder, monkeypatch) == measured(tmp_path / "whole", monkeypatch)
        waiting = [p for p in folder.rglob("*") if p.name.endswith((".part", ".lock"))]
        assert not [p for p in waiting if "rows" in p.parts]
        if not left:
            return
    raise AssertionError(f"{left} of {KILLS} kills came too late")
