"""How the code is written: a linter's rules, and those of ours that no linter has."""

import ast
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
BOOK = [*CHAPTERS, *sorted((ROOT / "nbs" / "experiments").glob("*.ipynb"))]
TESTS = sorted((ROOT / "tests").glob("*.py"))
MODULES = sorted((ROOT / "sae_lora").glob("[a-z]*.py"))


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def exported(cell: dict) -> bool:
    return cell["cell_type"] == "code" and source(cell).startswith("#| export")


def visible(cell: dict) -> bool:
    return cell["cell_type"] == "code" and not source(cell).startswith("#|")


def code_of(path: Path) -> str:
    "A file's code; of a notebook that of all its cells."
    if path.suffix == ".py":
        return path.read_text()
    return "\n\n".join(source(c) for c in cells(path) if c["cell_type"] == "code")


def ruff(*arguments):
    command = shutil.which("ruff", path=f"{sys.exec_prefix}/bin") or "ruff"
    done = subprocess.run([command, *arguments, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_the_linter_has_nothing_to_say():
    ruff("check", "--output-format", "concise")


def test_everything_is_formatted():
    ruff("format", "--check")


def test_only_captions_are_wider_than_the_column():
    "The linter is told to pass over them; so what it passes over has to be captions."
    for path in [*BOOK[len(CHAPTERS) :], ROOT / "nbs" / "ten_minutes.ipynb"]:
        wide = [line for line in code_of(path).splitlines() if len(line) > 100]
        assert all(line.startswith(("#| fig-cap", "#| fig-alt")) for line in wide), path.name


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def inside(node: ast.AST, kinds) -> list[ast.AST]:
    return [n for n in ast.walk(node) if n is not node and isinstance(n, kinds)]


def clever(node: ast.AST) -> str | None:
    "What a reader has to untangle in a node, if anything."
    if isinstance(node, COMPREHENSIONS) and inside(node, COMPREHENSIONS):
        return "a comprehension in a comprehension"
    if isinstance(node, ast.JoinedStr) and inside(node, ast.NamedExpr):
        return "a walrus in an f-string"
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
        if len(node.value.elts) > 2 and isinstance(node.targets[0], ast.Tuple):
            return "more than two things unpacked"
    return None


@pytest.mark.parametrize("path", [*BOOK, *TESTS], ids=lambda p: p.stem)
def test_statements_are_plain(path):
    for node in ast.walk(ast.parse(code_of(path))):
        found = clever(node)
        assert not found, f"{path.name}: {found}: {ast.unparse(node)[:200]}"


def test_cells_and_modules_are_small():
    every = [(path.stem, source(c)) for path in CHAPTERS for c in cells(path) if exported(c)]
    sizes = [len(text) for _, text in every]
    tenths = statistics.quantiles(sizes, n=10)
    assert statistics.median(sizes) <= 350 and tenths[-1] <= 800, (tenths[4], tenths[-1])
    lengths = [text.count("\n") for _, text in every]  # without the line that says `#| export`
    long = [name for (name, _), length in zip(every, lengths) if length > 48]  # run_adapt's options
    assert statistics.median(lengths) <= 10 and not long, long
    for path in MODULES:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        assert len([line for line in lines if not line.startswith("# %%")]) <= 300, path.name


def defined(cell: dict) -> set[str]:
    "The public names that a cell defines."
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = {node.name for node in ast.parse(source(cell)).body if isinstance(node, kinds)}
    return {name for name in names if name[0] != "_"}


def only_imports(cell: dict) -> bool:
    return all(isinstance(n, ast.Import | ast.ImportFrom) for n in ast.parse(source(cell)).body)


def shown_soon(path: Path) -> list[bool]:
    "For each exported cell that does more than import, whether it is shown within three cells."
    found, all_cells = [], cells(path)
    for i, cell in enumerate(all_cells):
        if exported(cell) and not only_imports(cell):
            after = [source(c) for c in all_cells[i + 1 : i + 4] if visible(c)]
            names = defined(cell)
            named = [re.search(rf"\b({'|'.join(names)})\b", s) for s in after]
            found.append(any(named) if names else bool(after))
    return found


def test_what_is_exported_is_shown():
    by_chapter = {path.stem: shown_soon(path) for path in CHAPTERS}
    every = [shown for chapter in by_chapter.values() for shown in chapter]
    worst = sorted(by_chapter, key=lambda name: by_chapter[name].count(False))[-3:]
    assert sum(every) >= 0.95 * len(every), (sum(every) / len(every), worst)


def test_no_cell_is_hidden_and_every_chapter_asserts():
    for path in CHAPTERS:
        assert "#| hide" not in code_of(path), path.name
        asserts = [c for c in cells(path) if visible(c) and "assert" in source(c)]
        assert asserts or "plots" in path.name, path.name
        code = [c for c in cells(path) if c["cell_type"] == "code"]
        shown = [c for c in code if not source(c).startswith(("#| export", "#| default_exp"))]
        assert 4 * len(shown) >= len(code), path.name


def test_a_public_name_has_one_meaning():
    homes = {}
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
                homes.setdefault(node.name, []).append(path.stem)
    twice = {name: where for name, where in homes.items() if len(where) > 1}
    assert not twice


def test_no_module_writes_into_another():
    "No assignment to an attribute of a module of ours, and none to one of its dictionaries."
    for path in MODULES:
        tree, ours = ast.parse(path.read_text()), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                ours |= {name.asname or name.name for name in node.names}
        for node in ast.walk(tree):
            for target in getattr(node, "targets", []) if isinstance(node, ast.Assign) else []:
                if isinstance(target, ast.Attribute | ast.Subscript):
                    owner = target.value
                    written = isinstance(owner, ast.Name) and owner.id in ours
                    assert not written, f"{path.name}: {ast.unparse(node)}"
