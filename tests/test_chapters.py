"""Every chapter runs from its first cell to its last, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from sae_lora.notebooks import stale_chapters

CHAPTERS = sorted((Path(__file__).parent.parent / "nbs").glob("[0-9]*.ipynb"))
RUN = """
import sys
from pathlib import Path
from nbdev.test import test_nb
ok, seconds = test_nb(Path(sys.argv[1]))
print(f"{seconds:.0f} s")
sys.exit(not ok)
"""


@pytest.mark.parametrize("name", [p.stem for p in CHAPTERS])
def test_notebook_runs(root, name):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            RUN,
            f"nbs/{name}.ipynb",
        ],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_outputs_are_those_of_the_code():
    "Each chapter was run after its code was last changed."
    told = "run sae_lora.notebooks.execute_chapter on these"
    assert not stale_chapters(), told
