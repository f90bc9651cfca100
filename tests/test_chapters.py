"""Every chapter runs from its first cell to its last, in a process of its own.

These processes are forked from one that has imported what chapters import, which is most of what a
short chapter takes.
"""

import os
import sys
from pathlib import Path

import pytest
from conftest import forkserver

CHAPTERS = sorted((Path(__file__).parent.parent / "nbs").glob("[0-9]*.ipynb"))
IMPORTED = ["nbdev.test", "peft", "sae_lens", "sae_lora.cli", "sae_lora.plots", "transformers"]


@pytest.fixture(scope="module")
def forks():
    "Where processes that have imported all that come from."
    return forkserver(IMPORTED)


def run_chapter(path: Path, said: Path):
    "Run a chapter as nbdev does; what it prints goes to the file `said`."
    from nbdev.test import test_nb

    output = os.open(said, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(path.parent.parent)
    ok, _ = test_nb(path)
    sys.exit(not ok)


@pytest.mark.parametrize("name", [p.stem for p in CHAPTERS])
def test_notebook_runs(root, forks, name, tmp_path):
    said = tmp_path / "said"
    process = forks.Process(target=run_chapter, args=(root / "nbs" / f"{name}.ipynb", said))
    process.start()
    process.join()
    assert process.exitcode == 0, said.read_text()[-6000:]
