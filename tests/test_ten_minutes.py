"""Page 1: its kept outputs are those of its code, it runs, and so do the answers to its exercises.

Run small, it takes about a minute of one core.
"""

import ast
import configparser
import re
from xml.etree import ElementTree

import nbformat
import pytest
from test_house import clever, code_of

from sae_lora.files import data_path
from sae_lora.notebooks import code_hash, execute_chapter

NAME = "nbs/ten_minutes.ipynb"
SMALL = dict(tokens=2048, held_out_tokens=512, steps=1)


@pytest.fixture(scope="module")
def page(root):
    return nbformat.read(root / NAME, 4)


def printed(nb) -> str:
    "All that the cells of a notebook printed."
    outputs = [o for c in nb.cells for o in c.get("outputs", [])]
    return "".join(o.text for o in outputs if o.output_type == "stream")


def figures(nb) -> list[str]:
    outputs = [o for c in nb.cells for o in c.get("outputs", [])]
    return [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]


def test_outputs_are_those_of_the_code(page, root):
    told = f"run sae_lora.notebooks.execute_chapter('{NAME}')"
    assert page.metadata.get("code_hash") == code_hash(page), told
    assert len(figures(page)) == 2 and (root / NAME).stat().st_size < 300_000


def share(name: str, nb) -> int:
    return int(re.search(rf"{name} +(-?\d+)%", printed(nb))[1])


def test_the_gap_visibly_closes(page):
    "In the kept outputs: by more of the cross-entropy than of the KL, as the text beside says."
    assert share("gap_closed", page) >= 10 and share("gap_closed", page) > share("kl_closed", page)
    assert share("kl_closed", page) > 0


def answers(nb) -> list[str]:
    "The code in the folded answers."
    folds = [c.source for c in nb.cells if "<details>" in c.source]
    return [code for fold in folds for code in re.findall(r"```python\n(.*?)```", fold, re.S)]


def test_exercises_have_folded_answers(page):
    folds = [c.source for c in page.cells if "<details>" in c.source]
    assert 4 <= len(folds) <= 6 and len(answers(page)) >= 4
    for text in folds:
        assert "<summary>Answer</summary>\n\n" in text and "\n\n</details>" in text


def test_statements_are_plain(page, root):
    for code in (code_of(root / NAME), *answers(page)):
        for node in ast.walk(ast.parse(code)):
            assert not clever(node), ast.unparse(node)[:200]


def test_it_runs_small_and_so_do_the_answers(page, tmp_path, root, monkeypatch):
    "With fewer tokens; the twelve lines and the package still give the same numbers."
    for cell in page.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = "\n".join(f"{name} = {value}" for name, value in SMALL.items())
    page.cells += [nbformat.v4.new_code_cell(code) for code in answers(page)]
    nbformat.write(page, tmp_path / "small.ipynb")
    monkeypatch.chdir(root)
    execute_chapter(tmp_path / "small.ipynb")
    done = nbformat.read(tmp_path / "small.ipynb", 4)
    said = printed(done)
    assert "2,048 tokens" in said and "rank 1:" in said and "block 29" in said
    none = re.search(r"special: (\S+)\nnone: (\S+)", said)
    assert float(none[2]) > 2 * float(none[1]) > 0  # the third exercise's answer
    assert abs(float(re.search(r"^(-?0\.\d{6})$", said, re.M)[1])) < 1e-4  # the second's
    assert len(figures(done)) == 2


def test_it_opens_in_colab(page, root):
    "The badge and the address to install from are those of the repository in settings.ini."
    config = configparser.ConfigParser()
    config.read(root / "settings.ini")
    where = config["DEFAULT"]
    repository = where["git_url"].removeprefix("https://github.com/")
    badge = f"https://colab.research.google.com/github/{repository}/blob/{where['branch']}/{NAME}"
    assert badge in page.cells[0].source and badge in (root / "README.md").read_text()
    assert (root / "nbs" / "images" / "open-in-colab.svg").exists()
    install = next(c.source for c in page.cells if c.cell_type == "code")
    assert f'"git+{where["git_url"]}"' in install


def test_it_is_the_first_thing_to_read(root):
    config = (root / "_quarto.yml").read_text()
    assert f"      - index.qmd\n      - {NAME}\n" in config and f"href: {NAME}" in config
    for name in ("README.md", "index.qmd"):
        text = (root / name).read_text()
        assert text.index(f"]({NAME})") < text.index("nbs/26_splice.ipynb"), name


def test_the_diagram_is_legible():
    "In light and dark pages: the page's own colour; on a phone: no letter under 11 pixels."
    text = data_path("four_models.svg").read_text()
    root = ElementTree.fromstring(text)
    width = float(root.get("viewBox").split()[2])
    sizes = [float(size) for size in re.findall(r'font-size="([\d.]+)"', text)]
    assert min(sizes) * min(340 / width, 1) >= 11 and 'fill="currentColor"' in text
    assert {"base", "spliced", "adapted", "adapted, unspliced"} <= set(root.itertext())
    assert root.get("role") == "img" and "<desc" in text and 'fill="white"' not in text
