"""The package on a device: everything goes where the model is, and the numbers are the CPU's.

The device is a pretend one, in a process of its own (`pretend.py`); what is run on it are the
entries of `device_entries.py`, each of them once in float32, where the device has no float64, like
Apple's, and once with a model in bfloat16.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pretend
import pytest
import torch
from device_entries import ENTRIES, judged, not_finite, public, recorded, tried

from sae_lora import cli

MODES = ("float32", "bfloat16")

# What no entry tries, because it touches no tensor, or none on a device.
NO_TENSORS = {
    "adapt.AdaptedRun": "a record",
    "adapt.Ready": "a record",
    "adapters.saved_along": "counts bytes",
    "arithmetic.Arithmetic": "a record",
    "arithmetic.fused": "makes a kernel, in test_arithmetic and test_gpu",
    "devices.onednn_pays": "asks the processor, in test_arithmetic",
    "devices.fast_float32": "how a processor multiplies, in test_arithmetic",
    "recipes.*": "records and numbers",
    "train.Options": "a record",
    "ending.*": "words",
    "embedded.*": "files; its models are loaded as any other",
    "files.*": "paths and files",
    "checked.*": "files; what is read goes to no device",
    "containers.*": "files; what is read goes to no device",
    "gemma_scope.*": "a file",
    "llama_scope.*": "files",
    "sparsify.*": "files",
    "dictionary_learning.*": "a file",
    "archives.*": "files",
    "circuits.*": "a file",
    "saelens.*": "files",
    "formats.recognised": "paths and files",
    "formats.Format": "a record",
    "hub.*": "asks the network",
    "cluster.*": "starts processes and sends files",
    "grid.*": "rows of numbers",
    "status.*": "rows counted",
    "documents.*": "text",
    "corpora.*": "text",
    "pretrained.*": "loads on the CPU, and checks there",
    "plots.*": "tables in, figures out",
    "phones.*": "figures and pages",
    "results.*": "rows of numbers in a file",
    "verdicts.*": "numbers, and words",
    "metrics.Estimate": "a number",
    "metrics.over_seeds": "numbers",
    "metrics.percent": "words",
    "metrics.seeds_told": "words",
    "claims.*": "rows of numbers, and words",
    "two_measures.*": "rows of numbers, and words",
    "text.excerpts": "text",
    "latents.evenly": "a list",
    "cards.passage_html": "text",
    "cards.peak_of": "numbers of a record",
    "cards.tokens_html": "text",
    "explorer.explorer_html": "text",
    "explorer.explorer_page": "text",
    "explorer.read_explored": "files",
    "explorer.save_explorer": "files",
    "explorer.Shown": "text",
    "explorer.explore_run": "a saved run and `explored`",
    "explorer.write_explorer": "run_adapt and `explored`",
    "sites.*": "names",
    "anatomy.Anatomy": "a record",
    "anatomy.Place": "a record",
    "anatomy.anatomy": "names of modules",
    "anatomy.canonical": "names of modules",
    "anatomy.linears_beyond": "names of modules",
    "anatomy.place": "a module",
    "anatomy.width_at": "a number",
    "kinds.*": "classes of SAEs, tried by whatever reads them",
    "lora.targets_of": "names of modules",
    "train_sae.hooks_of": "names",
    "export.export_lines": "words",
    "probing.labelled": "text",
    "adapt.budget": "arithmetic",
    "check.tokens_in": "arithmetic",
    "arithmetic.bf16_pays": "asks the hardware",
    "arithmetic.can_compile": "makes a kernel, in test_arithmetic and test_gpu",
    "devices.default_device": "a name, in test_lm",
    "report.read_report": "a file",
    "report.is_evaluation": "a file",
    "devices.default_dtype": "asks the hardware, in test_lm",
    "processes.processes": "several processes, in test_train",
    "processes.leads": "several processes, in test_train",
    "processes.agreed": "several processes, in test_sharded",
    "lm.shard": "several processes, in test_train",
    "lm.sharded": "several processes, in test_train",
    "adapters.push_to_hub": "files",
    "model_card.model_card": "text",
    "options.option": "words",
    "options.parse_parameters": "text",
    "options.read_inputs": "folders and texts",
    "cli.run": "runs a notebook",
    "cli.planned": "numbers",
    "cli.status": "rows counted",
    "counted.*": "shapes and numbers; its models have no weights",
    "asked.*": "parameters of runs",
    "plan.*": "numbers",
    "cli.build": "builds the site",
    "experiments.benchmarks": "paths and files",
    "experiments.paper_values": "a table",
    "experiments.swept": "a list of parameters",
    "notebooks.*": "runs notebooks",
    "entries.*": "text of the site",
    "findings.*": "text of the site",
    "site.*": "builds the site",
    "reference.*": "words",
    "speed.*": "times and memory of one machine",
}


def main(mode: str, names: list[str]):
    "Run entries on the pretend device; a line of JSON for each."
    torch.set_num_threads(1)
    pretend.install(float64=mode != "float32")
    for name in names:
        seen = set()
        if mode == "float32":
            with recorded(seen):
                here = tried(name, "cpu", torch.float32)
            found = judged(here, tried(name, pretend.NAME, torch.float32))
        else:
            found = tried(name, pretend.NAME, torch.bfloat16)
            found["not_finite"] = not_finite(found.pop("result"))
        print(json.dumps([name, mode, found | dict(called=sorted(seen))]), flush=True)


def start(mode: str, names: list[str], file: Path) -> subprocess.Popen:
    "A process that runs entries; it has one thread, for two of them run at a time."
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with file.open("w") as output:
        return subprocess.Popen(
            [sys.executable, __file__, mode, *names],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | own,
        )


@pytest.fixture(scope="session")
def found(request, tmp_path_factory) -> dict:
    "What came of the entries that were asked for, by name and mode."
    if why := pretend.missing():
        pytest.skip(why)
    ours = [i for i in request.session.items if i.path == Path(__file__)]
    wanted = {i.callspec.params["entry"] for i in ours if hasattr(i, "callspec")}
    names = [n for n in ENTRIES if n in wanted] or list(ENTRIES)
    said = {mode: tmp_path_factory.mktemp("devices") / mode for mode in MODES}
    running = {mode: start(mode, names, file) for mode, file in said.items()}
    try:
        for mode, process in running.items():
            process.wait(timeout=1800)
            assert process.returncode == 0, said[mode].read_text()[-3000:]
    finally:
        for process in running.values():
            process.kill()
    lines = [line for file in said.values() for line in file.read_text().splitlines()]
    results = [json.loads(line) for line in lines if line.startswith('["')]
    return {(name, mode): result for name, mode, result in results}


def of(found: dict, entry: str, mode: str) -> dict:
    "What came of an entry; the test is skipped where a package that it needs is not there."
    for package in ENTRIES[entry].needs:
        pytest.importorskip(package)
    return found[entry, mode]


@pytest.mark.parametrize("entry", ENTRIES)
def test_numbers_on_a_device_are_the_cpus(found, entry):
    result = of(found, entry, "float32")
    assert not result["error"], result["error"]
    most = ENTRIES[entry].tolerance  # the device's attention adds in another order
    assert result["apart"] < most, f"{result['path']} is off by {result['apart']:.1e}"


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_model_in_bfloat16_on_a_device(found, entry):
    result = of(found, entry, "bfloat16")
    assert not result["error"], result["error"]
    assert not result["not_finite"]


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_device_does_the_work(found, entry):
    "Nothing is trained or measured on the CPU in silence."
    for mode in MODES:
        assert not of(found, entry, mode)["products"], "matrices are multiplied on the CPU"


def test_entries_try_what_they_say(found):
    commands = {f"cli.{c.callback.__name__}" for c in cli.app.registered_commands}
    functions = {n for n, f in public().items() if not isinstance(f, type)} - commands
    called = {}
    for name in (n for n, mode in found if mode == "float32"):
        result = found[name, "float32"]
        about = called.setdefault(name.split("-")[0], set())  # some of several variants is enough
        about |= set(ENTRIES[name].covers if result["error"] else result["called"])
    for name, entry in ENTRIES.items():
        silent = functions & set(entry.covers) - called.get(name.split("-")[0], functions)
        assert not silent, f"{name} does not call {', '.join(sorted(silent))}"


def test_every_public_function_is_tried_on_a_device():
    covered = {c for entry in ENTRIES.values() for c in entry.covers}
    unknown = covered - set(public())
    assert not unknown, f"not there: {', '.join(sorted(unknown))}"
    left = {n for n in public() if n not in NO_TENSORS and f"{n.split('.')[0]}.*" not in NO_TENSORS}
    assert not left - covered, f"tried on no device: {', '.join(sorted(left - covered))}"


# The device itself: what a GPU refuses and allows, so does it.

REFUSED = """
x + torch.ones(3); torch.ones(3) + x; torch.ones(3) * x[0]
x.add_(torch.ones(3)); torch.ones(3).add_(x)
x @ torch.ones(3); torch.cat([x, torch.ones(3)]); torch.where(torch.ones(3) > 0, x, x)
nn.functional.linear(x, torch.ones(2, 3)); x.index_select(0, torch.tensor([0]))
x[i] + torch.ones(1); torch.ones(3)[i.to(d)]
nn.functional.embedding(torch.tensor([1]), x.view(3, 1))
x.masked_fill(torch.ones(3) > 0, 0); x.normal_(generator=torch.Generator()); x.numpy()
torch.isin(i.to(d), i); x.gather(0, i); x.index_fill(0, i, 0); x.scatter(0, i, 1.0)
x.index_copy(0, i, x); torch.searchsorted(i.to(d), i)
torch.rand(2, device=d, generator=torch.Generator()); nn.Linear(3, 1)(x); x.double()
"""
ALLOWED = """
x + 1; x * torch.tensor(2.0); torch.tensor(2.0) * x; x[i]; x[i > 0]; x.where(x > 1, 0.0); x.cpu()
torch.ones(3).to(d) + x; x.copy_(torch.ones(3)); torch.ones(3).copy_(x); x.tolist(); x.to(torch.int)
x.view(3, 1)[1:].T[0] + 1; torch.stack([x, x]).sum(0); x.topk(2); x.sort(); nn.Linear(3, 1).to(d)(x)
torch.rand(2, device=d); torch.tensor([1.0], device=d) + x; x.cumsum(0); nn.functional.dropout(x)
"""
PROBE = """
import json, sys, torch
from torch import nn
import pretend
d, i = pretend.install(float64=False), torch.tensor([0, 1, 2])
refused = {}
for code in json.loads(sys.argv[1]):
    x = torch.arange(3.0, device=d)
    try: exec(code)
    except (RuntimeError, TypeError) as e: refused[code] = str(e)
print(json.dumps(refused))
"""


def statements(lines: str) -> list[str]:
    return [s.strip() for s in lines.replace("\n", ";").split(";") if s.strip()]


@pytest.mark.skipif(bool(pretend.missing()), reason=str(pretend.missing()))
def test_the_device_refuses_what_a_gpu_refuses():
    codes = json.dumps(statements(REFUSED) + statements(ALLOWED))
    done = subprocess.run(
        [sys.executable, "-c", PROBE, codes],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    refused = json.loads(done.stdout)
    assert list(refused) == statements(REFUSED), refused


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
