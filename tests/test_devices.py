"""The package on a device: everything goes where the model is, and the numbers are the CPU's.

The device is a pretend one, in a process of its own (`pretend.py`); what is run on it are the entries
of `device_entries.py`, each of them once in float32 and once with a model in bfloat16. In float32 the
device has no float64, like Apple's.
"""
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pretend
import pytest
import torch
from device_entries import ENTRIES, compared, conditions, not_finite, public, recorded
from device_entries import ProductsOnCPU

from sae_lora import cli

MODES = ("float32", "bfloat16")
TOLERANCE = 1e-5  # relative to the largest number of a result: attention adds in another order

# What no entry tries, because it touches no tensor, or none on a device.
NO_TENSORS = {
    "files.*": "paths and files",
    "plots.*": "tables in, figures out",
    "results.*": "rows of numbers in a file",
    "text.docstrings": "text",
    "text.corpus": "text",
    "text.for_validation": "text",
    "text.passages": "text",
    "saebench.labelled": "text",
    "embedded.*": "files; its models are loaded as any other",
    "lm.default_device": "a name, in test_lm",
    "lm.processes": "several processes, in test_training",
    "lm.leads": "several processes, in test_training",
    "lm.shard": "several processes, in test_training",
    "lm.sharded": "several processes, in test_training",
    "lora.push_to_hub": "files",
    "cli.parse_parameters": "text",
    "cli.parse_batch": "text",
    "lora.no_share": "numbers in, text out",
    "lora.won_back": "numbers in, text out",
    "cli.run": "runs a notebook",
    "cli.build": "builds the site",
    "experiments.project": "paths and files",
    "experiments.rows_path": "paths and files",
    "experiments.benchmarks": "paths and files",
    "experiments.together": "parameters",
    "experiments.rows_of": "parameters and rows",
    "experiments.paper_values": "a table",
    "experiments.experiments": "paths and files",
    "experiments.defaults": "reads a notebook",
    "experiments.settings": "reads a file of parameters",
    "experiments.tidy": "a notebook",
    "experiments.run_experiment": "runs a notebook",
    "experiments.stage_site": "builds the site",
    "experiments.build_site": "builds the site",
}
# Entries in which matrices are multiplied on the CPU, rightly.
ON_CPU = {
    "probes": "points and latents of texts are on the CPU, where scikit-learn needs them",
}


def tried(name: str, device, dtype) -> dict:
    "What came of one entry: its result, or the error; and products of matrices on the CPU."
    began, products = time.process_time(), ProductsOnCPU()
    try:
        with conditions(mixed=dtype == torch.bfloat16), products:
            result = ENTRIES[name].run(device, dtype)
        found = dict(result=result, error=None)
    except (Exception, SystemExit) as e:
        where = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(e.__traceback__)
                 if Path(f.filename).parent.name in ("sae_lora", "tests")
                 and Path(f.filename).name not in ("pretend.py", Path(__file__).name)]
        error = f"{type(e).__name__}: {str(e)[:600]} ({' > '.join(where[-4:])})"
        found = dict(result=None, error=error)
    return found | dict(products=sorted(products.where), seconds=time.process_time() - began)


def judged(name: str, here: dict, there: dict) -> dict:
    "What came of an entry on the device, and how far its numbers are from the CPU's."
    about = {k: there[k] for k in ("error", "products", "seconds")} | dict(cpu=here["seconds"])
    if here["error"]:
        return about | dict(error=f"on the CPU: {here['error']}")
    if there["error"]:
        return about
    try:
        apart, path = compared(here["result"], there["result"])
    except AssertionError as e:
        return about | dict(error=str(e)[:600])
    return about | dict(apart=apart, path=path)


def main(mode: str, names: list[str]):
    "Run entries on the pretend device; a line of JSON for each."
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    pretend.install(float64=mode != "float32")
    for name in names:
        seen = set()
        if mode == "float32":
            with recorded(seen):
                here = tried(name, "cpu", torch.float32)
            found = judged(name, here, tried(name, pretend.NAME, torch.float32))
        else:
            found = tried(name, pretend.NAME, torch.bfloat16)
            found["not_finite"] = not_finite(found.pop("result"))
        print(json.dumps([name, mode, found | dict(called=sorted(seen))]), flush=True)


def start(mode: str, names: list[str], output):
    "A process that runs entries; it has one thread, for two of them run at a time."
    return subprocess.Popen([sys.executable, __file__, mode, *names], stdout=output,
                            stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="session")
def found(request, tmp_path_factory) -> dict:
    "What came of the entries that were asked for, by name and mode."
    if why := pretend.missing():
        pytest.skip(why)
    ours = [i for i in request.session.items if i.path == Path(__file__)]
    wanted = {i.callspec.params["entry"] for i in ours if hasattr(i, "callspec")}
    names = [n for n in ENTRIES if n in wanted] or list(ENTRIES)
    said = {mode: tmp_path_factory.mktemp("devices") / mode for mode in MODES}
    running = {mode: start(mode, names, open(file, "w")) for mode, file in said.items()}
    try:
        for mode, process in running.items():
            process.wait(timeout=900)
            assert process.returncode == 0, said[mode].read_text()[-3000:]
    finally:
        for process in running.values():
            process.kill()
    lines = [line for file in said.values() for line in file.read_text().splitlines()]
    results = [json.loads(line) for line in lines if line.startswith('["')]
    return {(name, mode): result for name, mode, result in results}


@pytest.mark.parametrize("entry", ENTRIES)
def test_numbers_on_a_device_are_the_cpus(found, entry):
    result = found[entry, "float32"]
    assert not result["error"], result["error"]
    assert result["apart"] < TOLERANCE, f"{result['path']} is off by {result['apart']:.1e}"


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_model_in_bfloat16_on_a_device(found, entry):
    result = found[entry, "bfloat16"]
    assert not result["error"], result["error"]
    assert not result["not_finite"]


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_device_does_the_work(found, entry):
    "Nothing is trained or measured on the CPU in silence."
    if entry.split("-")[0] not in ON_CPU:
        assert not found[entry, "float32"]["products"] + found[entry, "bfloat16"]["products"]


def test_entries_try_what_they_say(found):
    commands = {f"cli.{c.callback.__name__}" for c in cli.app.registered_commands}
    functions = {n for n, f in public().items() if not isinstance(f, type)} - commands
    for name, entry in ENTRIES.items():
        if (name, "float32") in found and not found[name, "float32"]["error"]:
            silent = functions & set(entry.covers) - set(found[name, "float32"]["called"])
            assert not silent, f"{name} does not call {', '.join(sorted(silent))}"


def test_every_public_function_is_tried_on_a_device():
    covered = {c for entry in ENTRIES.values() for c in entry.covers}
    unknown = covered - set(public())
    assert not unknown, f"not there: {', '.join(sorted(unknown))}"
    left = {n for n in public() if n not in NO_TENSORS and f"{n.split('.')[0]}.*" not in NO_TENSORS}
    assert not left - covered, f"tried on no device: {', '.join(sorted(left - covered))}"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
