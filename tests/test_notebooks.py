"""Runs are strict and leave whole files or none; parameter files name what exists."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("papermill")
import nbformat
from nbformat.v4 import new_code_cell, new_notebook

from sae_lora import notebooks as nbs
from sae_lora.files import UsageError
from sae_lora.results import Results, project, rows_path

NAMES = nbs.experiments()
SQUARES = """
import os, sys
from sae_lora.grid import rows_of
def square(group):
    for p in group:
        yield dict(square=p['rank'] ** 2)
rows = rows_of('squares', [dict(rank=x) for x in xs], square)
print(os.getcwd())
print('no' + 'ise', file=sys.stderr)
print(rows.square.tolist())
"""


@pytest.fixture
def small_project(tmp_path, monkeypatch):
    """A project with one experiment, `squares`, whose rows need no model.

    It is a function that writes its cells anew.
    """
    folder = tmp_path / "clone" / "nbs" / "experiments"
    (folder / "params" / "laptop").mkdir(parents=True)
    (folder / "params" / "laptop" / "squares.yml").write_text("estimate_minutes: 1\nxs: [1, 2]\n")

    def write(parameters="xs = [3]", body=SQUARES, tags=("parameters",)):
        cells = [new_code_cell(parameters, metadata=dict(tags=list(tags))), new_code_cell(body)]
        nbformat.write(
            new_notebook(
                cells=cells,
                metadata={
                    "kernelspec": {
                        "name": "python3",
                        "language": "python",
                        "display_name": "python3",
                    }
                },
            ),
            folder / "squares.ipynb",
        )

    write()
    monkeypatch.chdir(tmp_path / "clone")
    monkeypatch.delenv("SAE_LORA_RESULTS", raising=False)
    return write


def test_a_run_writes_rows_and_a_clean_copy(small_project):
    out = nbs.run_experiment("squares")
    assert out.name == "squares.ipynb" and out.parent.name == "results"
    nb, text = nbformat.read(out, 4), out.read_text()
    assert (
        "[1, 4]" in text
        and "noise" not in text
        and str(out.parents[2]) not in text
        and "papermill" not in json.dumps(nb.metadata)
    )
    assert "start_time" not in text and len(Results(rows_path("squares")).rows()) == 2
    assert nbs.run_experiment("squares").read_text() == text  # a second run changes nothing


def test_a_deleted_row_is_the_only_one_computed(small_project):
    nbs.run_experiment("squares")
    path = rows_path("squares")
    before = path.read_text()
    path.write_text("".join(before.splitlines(keepends=True)[:1]))
    with pytest.raises(
        UsageError, match="1 of 2 rows of squares are missing; `sae-lora run squares`"
    ):
        nbs.run_experiment("squares", draw=True)
    nbs.run_experiment("squares")
    assert path.read_text() == before
    path.chmod(0o444)
    nbs.run_experiment("squares", draw=True)


def test_a_failed_run_leaves_nothing(small_project):
    small_project(body="raise RuntimeError('broken')")
    with pytest.raises(Exception, match="broken"):
        nbs.run_experiment("squares")
    assert not any((project() / "nbs" / "results").glob("*"))


def test_a_notebook_whose_process_is_killed_keeps_its_rows(small_project):
    small_project(body=SQUARES + "import signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(UsageError, match="squares: its process died.*run it again"):
        nbs.run_experiment("squares")
    assert len(Results(rows_path("squares")).rows()) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(tags=()), "0 cells are tagged parameters"),
        (dict(parameters="xs = range(3)"), "lines like"),
        (dict(parameters="ys = [1]"), "no parameter 'xs'; it has ys"),
    ],
)
def test_notebooks_that_are_refused(small_project, change, message):
    small_project(**change)
    with pytest.raises(UsageError, match=message):
        nbs.run_experiment("squares")


def test_mistakes_on_the_command_line():
    for given, said in (
        ("run nope", "give one of"),
        ("run 02_sparsity -p rnak 4", "no parameter 'rnak'"),
        ("run 02_sparsity --size huge", "has no size"),
        ("run 02_sparsity -p rank", "-p NAME VALUE"),
        ("run", "--all"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", "from sae_lora.cli import main; main()", *given.split()],
            capture_output=True,
            text=True,
        )
        assert (
            done.returncode == 2
            and len(done.stderr.strip().splitlines()) == 1
            and said in done.stderr
        ), done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_size_names_known_parameters(name):
    for size in ("smoke", "laptop", "gpu", "paper"):
        if nbs.has_size(name, size):
            _, minutes = nbs.settings(name, size)
            assert (minutes > 0) == (size in ("smoke", "laptop"))  # `plan` says it of the others


def test_sources_have_no_outputs(root):
    for name in NAMES:
        for c in nbformat.read(root / "nbs" / "experiments" / f"{name}.ipynb", 4).cells:
            assert not c.get("outputs"), name


@pytest.mark.parametrize("name", NAMES)
def test_figures_can_be_read_alone(name, root):
    "Each cell that draws says what is to be seen, above and in place of the picture."
    drawing = [
        c.source
        for c in nbformat.read(root / "nbs" / "experiments" / f"{name}.ipynb", 4).cells
        if c.cell_type == "code" and "#| fig-cap: " in c.source
    ]
    assert drawing and all("#| fig-alt: " in s for s in drawing)


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_saes_are_in_the_registry(name):
    "Each `release:id` exists in SAELens, and those that name their hook are at the layer meant."
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory, values = get_pretrained_saes_directory(), nbs.settings(name, "paper")[0]
    of_models = [m["sae"] for m in values.get("models", [])]
    named = [*values.get("saes", []), *of_models, values.get("sae"), values.get("sparse")]
    specs = [s for s in named if isinstance(s, str)]
    if any("{}" in s for s in specs):
        specs = [specs[0].format(i) for chosen in values["sets"] for i in chosen]
    for spec in specs:
        release, _, sae_id = spec.partition(":")
        assert release in directory and sae_id in directory[release].saes_map, spec


def test_outputs_are_those_of_the_code():
    "Each chapter was run after its code was last changed."
    told = "run sae_lora.notebooks.execute_chapter on these"
    assert not nbs.stale_chapters(), told
