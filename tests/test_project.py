"""Notebooks and package are one thing; modules import only upward in the book's order."""

import ast
import re
import shutil
import subprocess
import sys

from sae_lora.site import chapters, listed

APART = "text embedded sae results plots".split()  # these know nothing of one another


def order() -> list[str]:
    "The modules in import order, which is that of the chapters' numbers."
    return [c.name for c in chapters()]


def imports(path) -> set[str]:
    "Modules of the package that a module imports: relatively or absolutely, also in functions."
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["sae_lora" if node.level else "", node.module]))
            whole = base == "sae_lora"
            found |= {f"{base}.{a.name}" for a in node.names} if whole else {base}
    return {name.split(".")[1] for name in found if name.startswith("sae_lora.")}


def test_all_imports_are_seen(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "import sae_lora.a\nfrom sae_lora.b import x\nfrom .c import y\nfrom . import d\n"
        "def f():\n    from sae_lora import e\n    from .g.h import z\n    import torch\n"
    )
    assert imports(path) == set("abcdeg")


def test_modules_import_only_from_above(root):
    modules = order()
    assert sorted(modules) == sorted(p.stem for p in (root / "sae_lora").glob("[a-z]*.py"))
    for path in (root / "sae_lora").glob("[a-z]*.py"):
        above = modules[: modules.index(path.stem)]
        assert imports(path) <= set(above), f"{path.stem} imports {imports(path) - set(above)}"
        if path.stem in APART:
            assert not imports(path) & set(APART)


def test_the_lists_of_chapters_are_current(root):
    for name, text in listed().items():
        told = (
            f"{name} is not; run python -c 'from sae_lora.site import write_lists; write_lists()'"
        )
        assert (root / name).read_text() == text, told


def test_nothing_exported_needs_nbdev(root):
    for path in (root / "sae_lora").glob("[a-z]*.py"):
        assert not re.search(r"^\s*(from|import) (nbdev|fastcore|execnb)", path.read_text(), re.M)


def test_notebooks_and_package_are_in_sync(root, tmp_path):
    "In a copy: remove what was generated, clean, export; nothing may differ from the commit."
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    copy = tmp_path / "copy"
    for name in filter(None, names):
        if name.startswith("data/") or not (root / name).exists():
            continue
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, copy / name)
    for command in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "as committed"],
    ):
        subprocess.run(["git", *command], cwd=copy, check=True)
    for module in (copy / "sae_lora").glob("[a-z]*.py"):
        module.unlink()
    (copy / "sae_lora" / "_modidx.py").unlink()
    for tool in ("nbdev_clean", "nbdev_export"):
        subprocess.run(
            [shutil.which(tool, path=f"{sys.exec_prefix}/bin") or tool],
            cwd=copy,
            check=True,
            capture_output=True,
        )
    assert (
        subprocess.run(
            ["git", "status", "--porcelain"], cwd=copy, capture_output=True, text=True
        ).stdout
        == ""
    )


def test_the_project_speaks_of_itself_alone(root):
    names = subprocess.run(
        ["git", "ls-files"], cwd=root, capture_output=True, text=True
    ).stdout.split()
    for name in names:
        if name.endswith((".py", ".md", ".ipynb", ".ini", ".toml", ".txt", ".yml", ".json")):
            text = (root / name).read_text(errors="ignore")
            assert not re.search(
                r"(?<![\w./~])/(root|work|home)/\w|files\.pythonhosted|pypi\.org/simple", text
            ), name
