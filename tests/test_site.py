"""The site, built with smalldocs: no dead link, figures there, search finds things."""

import html
import json
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("smalldocs")
from sae_lora.entries import public_names
from sae_lora.files import UsageError
from sae_lora.findings import NOT_RUN
from sae_lora.site import PARTS, between, chapters, parts


def test_chapters_are_what_their_files_say(root):
    found = chapters()
    assert [root / c.path for c in found] == sorted((root / "nbs").glob("[0-9]*.ipynb"))
    for c in found:
        assert (root / "sae_lora" / f"{c.name}.py").exists() and c.title and c.about, c
        assert (root / c.path).stem == f"{c.number}_{c.name}"
    assert sum(parts().values(), []) == found and all(parts().values())


def test_a_part_begins_with_a_chapter_that_exists(monkeypatch):
    monkeypatch.setitem(PARTS, "The end", "no_such_chapter")
    with pytest.raises(UsageError, match="no chapter is called no_such_chapter; mend PARTS"):
        parts()


@pytest.mark.parametrize("text", ["", "a: begin\n", "a: begin\na: end\na: begin\na: end\n"])
def test_a_list_stands_between_two_lines(text):
    with pytest.raises(UsageError, match="lists of a; one, between"):
        between(text, "a", "1")


def pages(site):
    return sorted(site.rglob("*.html"))


def test_every_page_of_the_sidebar_is_built(site, root):
    for name in re.findall(r"- ((?:nbs|pages)/\S+)", (root / "_quarto.yml").read_text()):
        assert (site / Path(name).with_suffix(".html")).exists(), name


def test_every_experiment_is_one_page(site, root):
    for path in (root / "nbs" / "experiments").glob("*.ipynb"):
        assert len([p for p in pages(site) if p.stem == path.stem]) == 1, path.stem


def test_experiments_at_a_glance(site, root):
    "Every executed experiment is there with its claim, its figure and what it found."
    page = (site / "pages" / "experiments.html").read_text()
    for path in (root / "nbs" / "results").glob("*.ipynb"):
        if not (root / "nbs" / "experiments" / path.name).exists():
            continue
        assert (
            (site / "pages" / "figures" / f"{path.stem}.png").exists()
            and f"{path.stem}.png" in page
            and f"{path.stem}.html" in page
        ), path.stem
        sections = page[page.index("</table>", page.index("<main")) :]  # below the table of claims
        part = sections[sections.index(f'{path.stem}.html"') :]
        part = part[: part.find("<h2", 10)]
        assert "<blockquote" in part and "<li>" in part and "<picture>" in part, path.stem


def test_figures_of_experiments_have_pictures_for_phones(site, root):
    "One beside each, narrower, and a browser may choose."
    for path in (root / "nbs" / "results").glob("*.ipynb"):
        if not (root / "nbs" / "experiments" / path.name).exists():
            continue
        pictures = re.findall(
            r'<picture><source media="\(max-width: 600px\)" srcset="(.*?)">(<img.*?>)</picture>',
            (site / "nbs" / "experiments" / f"{path.stem}.html").read_text(),
        )
        assert pictures, path.stem
        for narrow, image in pictures:
            assert narrow.replace(".phone", "") in image and "alt=" in image
            assert (site / "nbs" / "experiments" / narrow).exists()
            assert (site / "nbs" / "experiments" / narrow.replace(".phone", "")).exists()


def test_no_dead_links(site):
    ids = {p: set(re.findall(r'\bid="([^"]+)"', p.read_text())) for p in pages(site)}
    dead = []
    for page in pages(site):
        for link in re.findall(r'(?:href|src)="([^"]+)"', page.read_text()):
            parts = urlsplit(link.replace("&amp;", "&"))
            if parts.scheme or parts.netloc:
                continue
            target = (
                page
                if not parts.path
                else (
                    site / parts.path.lstrip("/")
                    if parts.path.startswith("/")
                    else page.parent / unquote(parts.path)
                ).resolve()
            )
            if target.is_dir():
                target = target / "index.html"
            if (
                not target.exists()
                or target in ids
                and parts.fragment
                and unquote(parts.fragment) not in ids[target]
            ):
                dead.append((page.name, link))
    assert not dead


def test_pages_read_well(site):
    for page in pages(site):
        text = re.sub(r"<(script|style|pre|code)\b.*?</\1>", "", page.read_text(), flags=re.S)
        assert not re.search(r"^:::|>\s*:::|\$\$|#\| ", text, re.M), page
        for image in re.findall(r"<img\b[^>]*>", text):
            assert "src=" in image, (page, image)
    assert 'alt="Left:' in (site / "index.html").read_text()


def test_chapters_begin_with_all_that_they_say(site, root):
    "Each is one page, and what stands below title and claim in a chapter's first cell is on it."
    for path in (root / "nbs").glob("[0-9]*.ipynb"):
        first = "".join(json.loads(path.read_text())["cells"][0]["source"]).split("\n\n")
        (page,) = [p.read_text() for p in pages(site) if p.stem == path.stem]
        for paragraph in first[2:]:
            words = re.match(r"[\w ,]+", paragraph)
            if words and len(words[0]) > 12:
                assert words[0].strip() in page, (path.name, words[0])


def text_of(page: Path) -> str:
    "What a page says, without tags; spaces and line ends do not count."
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", "", page.read_text())))


PLACES = ("what-to-notice", "the-figure", "the-table", "what-is-measured", "parameters-and-code")


def test_experiments_begin_with_what_was_found(site, root):
    "Findings, figure, table, method, code, in this order; and no cell is left out."
    for path in (root / "nbs" / "results").glob("*.ipynb"):
        page = site / "nbs" / "experiments" / f"{path.stem}.html"
        found = [page.read_text().find(f'id="{place}"') for place in PLACES]
        there = [at for at in found if at >= 0]
        assert there == sorted(there) and found[0] >= 0 and found[-1] >= 0, (path.stem, found)
        said = text_of(page)
        for cell in json.loads(path.read_text())["cells"]:
            code = cell["cell_type"] == "code"
            for line in "".join(cell["source"]).splitlines() if code else []:
                shown = " ".join(line.split())
                assert line.startswith("#|") or shown in said, (path.stem, line)


def test_an_experiment_that_was_not_run_says_so(site, root):
    for path in (root / "nbs" / "experiments").glob("*.ipynb"):
        page = site / "nbs" / "experiments" / f"{path.stem}.html"
        run = (root / "nbs" / "results" / path.name).exists()
        assert (NOT_RUN in page.read_text()) is not run, path.stem


def test_pages_lead_to_the_previous_and_the_next(site, root):
    order = re.findall(r"- ((?:nbs|pages)/\S+)", (root / "_quarto.yml").read_text())
    for before, page, after in zip(order, order[1:], order[2:]):
        text = (site / Path(page).with_suffix(".html")).read_text()
        foot = text[text.index('<nav class="page-navigation"') :]
        assert f"{Path(before).stem}.html" in foot and f"{Path(after).stem}.html" in foot, page


def test_chapters_are_numbered(site):
    for c in chapters():
        text = (site / c.path).with_suffix(".html").read_text()
        title = html.escape(f"{c.number.removeprefix('0')} · {c.title}", quote=False)
        assert title in html.unescape(text).replace("’", "'"), c.name
        assert 'property="og:title"' in text and 'property="og:description"' in text, c.name
        assert 'rel="icon"' in text


def test_names_have_one_place(site, root):
    "Every public name is listed, and leads to the one element of its page with that anchor."
    page = (site / "pages" / "names.html").read_text()
    every = public_names(root)
    assert len(every) > 700 and all(f"#{n.entry.name}" in page for n in every)
    for page in pages(site):
        ids = re.findall(r'\sid="([^"]+)"', page.read_text())
        twice = {i for i in ids if ids.count(i) > 1}
        assert not twice, (page, twice)


def test_pages_draw_without_a_network(site):
    "Formulas are MathML, and no page fetches a script, a style or a font from elsewhere."
    assert "<math" in next(site.rglob("26_splice.html")).read_text()
    for page in pages(site):
        text = page.read_text()
        assert 'class="math' not in text and not re.findall(
            r'<script[^>]*src="https?:|<link[^>]*stylesheet[^>]*href="https?:', text
        ), page


def test_exported_code_is_on_its_page(site):
    "Folded below its signature, constants too, and linked to its module."
    for name, code in {"26_splice": "def", "39_recipes": "RECIPES"}.items():
        text = (site / "nbs" / f"{name}.html").read_text()
        folds = re.findall(r'<details class="source".*?</details>', text, re.S)
        assert any(code in re.sub("<[^>]*>", "", fold) for fold in folds), name
        assert all(f"/sae_lora/{name[3:]}.py" in fold for fold in folds), name


@pytest.mark.parametrize(
    "rule",
    [
        r"\.cell-output pre code \{ white-space: pre-wrap",
        r"#quarto-sidebar \{ background: var\(--bs-body-bg\)",
        r"^table \{[^}]*overflow-x: auto",
        r"@media print",
    ],
)
def test_style_keeps_pages_readable(root, rule):
    "Outputs wrap, the sidebar follows the theme, wide tables scroll inside, and pages print."
    style = (root / "styles.css").read_text()
    assert re.search(rule, style, re.M) and "http" not in style and "@import" not in style


def test_search_finds_splice(site):
    assert any(
        "splice" in json.dumps(entry).lower()
        for entry in json.loads((site / "search.json").read_text())
    )
