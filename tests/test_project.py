"""Notebooks and package are one thing; modules import only upward in the book's order; cells and modules stay small."""
import ast
import json
import re
import shutil
import statistics
import subprocess
import sys

import pytest

ORDER = "files checked hub documents text embedded pretrained lm sae splice lora loss metrics states loop train tasks steering saebench latents results plots experiments check adapt ending terminal cli".split()
APART = "text embedded sae results plots".split()  # these know nothing of one another


def notebooks(root): return sorted((root / "nbs").glob("[0-9]*.ipynb"))


def cells(path): return json.loads(path.read_text())["cells"]


def source(cell): return "".join(cell["source"])


def imports(path) -> set[str]:
    "Modules of the package that a module imports."
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level: found |= {node.module} if node.module else {a.name for a in node.names}
    return found


def test_modules_import_only_from_above(root):
    assert imports(root / "sae_lora" / "splice.py") == {"files", "lm", "sae"}  # the test sees imports at all
    for path in (root / "sae_lora").glob("[a-z]*.py"):
        above = ORDER[:ORDER.index(path.stem)]
        assert imports(path) <= set(above), f"{path.stem} imports {imports(path) - set(above)}"
        if path.stem in APART: assert not imports(path) & set(APART)


def test_nothing_exported_needs_nbdev(root):
    for path in (root / "sae_lora").glob("[a-z]*.py"): assert not re.search(r"^\s*(from|import) (nbdev|fastcore|execnb)", path.read_text(), re.M)


def test_notebooks_and_package_are_in_sync(root, tmp_path):
    "In a copy: remove what was generated, clean, export; nothing may differ from what is committed."
    names = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    copy = tmp_path / "copy"
    for name in filter(None, names):
        if name.startswith("data/") or not (root / name).exists(): continue
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, copy / name)
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "as committed"]): subprocess.run(["git", *command], cwd=copy, check=True)
    for module in (copy / "sae_lora").glob("[a-z]*.py"): module.unlink()
    (copy / "sae_lora" / "_modidx.py").unlink()
    for tool in ("nbdev_clean", "nbdev_export"): subprocess.run([shutil.which(tool, path=f"{sys.exec_prefix}/bin") or tool], cwd=copy, check=True, capture_output=True)
    assert subprocess.run(["git", "status", "--porcelain"], cwd=copy, capture_output=True, text=True).stdout == ""


def test_cells_and_modules_are_small(root):
    for path in (root / "sae_lora").glob("[a-z]*.py"): assert sum(1 for l in path.read_text().splitlines() if l.strip() and not l.startswith("# %%")) <= 300, path
    sizes = [len(source(c).splitlines()) - 1 for nb in notebooks(root) for c in cells(nb) if c["cell_type"] == "code" and source(c).startswith("#| export")]
    assert max(sizes) <= 40 and statistics.median(sizes) <= 10, (max(sizes), statistics.median(sizes))


def test_no_cell_is_hidden_and_every_chapter_shows_and_asserts(root):
    for nb in notebooks(root):
        code = [source(c) for c in cells(nb) if c["cell_type"] == "code"]
        shown = [c for c in code if not c.startswith("#| export") and not c.startswith("#| default_exp")]
        assert not any("#| hide" in c for c in code), nb.name
        assert len(shown) * 2 >= len(code) / 2 and (any("assert" in c for c in shown) or "plots" in nb.name), nb.name


def test_the_project_speaks_of_itself_alone(root):
    names = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True).stdout.split()
    for name in names:
        if name.endswith((".py", ".md", ".ipynb", ".ini", ".toml", ".txt", ".yml", ".json")):
            text = (root / name).read_text(errors="ignore")
            assert not re.search(r"(?<![\w./~])/(root|work|home)/\w|files\.pythonhosted|pypi\.org/simple", text), name


@pytest.mark.parametrize("name", ["00_files", "00_text", "00a_embedded", "00b_checked", "00c_hub", "00d_documents", "00e_pretrained", "01_lm", "02_sae", "03_splice", "04_lora", "05_loss", "05_metrics", "05_states", "06_loop", "06_train", "07_tasks", "07a_steering", "07b_saebench", "07c_latents", "08_results", "09_plots", "10_experiments", "10a_check", "10b_adapt", "10c_ending", "10d_terminal", "11_cli"])
def test_notebook_runs(root, name):
    done = subprocess.run([sys.executable, "-c", f"import sys; from pathlib import Path; from nbdev.test import test_nb; ok, t = test_nb(Path('nbs/{name}.ipynb')); print(f'{{t:.0f}} s'); sys.exit(not ok)"],
                          cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_every_notebook_is_in_the_list(root):
    listed = re.search(r"parametrize\(\"name\", (\[.*\])\)\ndef test_notebook_runs", (root / "tests" / "test_project.py").read_text())[1]
    assert [p.stem for p in notebooks(root)] == json.loads(listed)
