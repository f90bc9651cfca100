"""The how-to pages: readers find what they look for, commands and snippets run, at a tiny size."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT
from hostile import told_of
from mutants import copied

PAGES = sorted((ROOT / "pages").glob("*.qmd"))
RUN = ("check", "adapt", "train-sae", "evaluate", "export")  # the commands that run here
CLICKS = 3


# What a reader finds, and how far from home.


def links(page: Path) -> set[Path]:
    "The pages and chapters that a page links to, in its text."
    if page.suffix != ".qmd":
        return set()
    found = re.findall(r"\]\(([^)#\s]+\.(?:qmd|ipynb))", page.read_text())
    return {(page.parent / name).resolve() for name in found}


def distances(home: Path) -> dict[Path, int]:
    "Clicks from home to each page."
    found, last = {home: 0}, {home}
    while last:
        nearer = {link for page in last for link in links(page)} - set(found)
        steps = 1 + max(found.values())
        found |= dict.fromkeys(nearer, steps)
        last = nearer
    return found


ANSWERS = [  # who asks, where the answer stands, and what it looks like
    ("student: the gap", "glossary", r"## Gap\n\nWhat the splice costs"),
    ("student: L0", "glossary", r"## L0\n\nThe mean number of latents that fire"),
    ("student: FVU", "glossary", r"## FVU\n\nFraction of variance unexplained"),
    ("student: adapt the default model", "your-own", r"sae-lora demo"),
    (
        "researcher: the command",
        "gemma-scope",
        r"adapt --model google/gemma-2-2b(.|\n)*layer_12/width_16k/average_l0_82",
    ),
    ("researcher: memory and time", "gemma-scope", r"\| 24 GB .*GB.* (minutes|hours) "),
    ("researcher: what to expect", "gemma-scope", r"CE closed \| \d"),
    ("engineer: licence", "limitations", r"Apache-2\.0"),
    ("engineer: versions", "limitations", r"Python 3\.11 to 3\.13"),
    ("engineer: the key of the gap", "reference", r"\| `gap`, `gap_closed`, `kl_closed` \|"),
    ("engineer: in plain PEFT", "elsewhere", r"PeftModel\.from_pretrained\(lm, "),
]


@pytest.mark.parametrize("name, pattern", [a[1:] for a in ANSWERS], ids=[a[0] for a in ANSWERS])
def test_an_answer_is_near(name, pattern):
    page = ROOT / "pages" / f"{name}.qmd"
    assert re.search(pattern, page.read_text())
    assert distances(ROOT / "index.qmd")[page] <= CLICKS


def test_every_page_is_near_and_in_the_sidebar():
    near = distances(ROOT / "index.qmd")
    sidebar = (ROOT / "_quarto.yml").read_text()
    for page in PAGES:
        assert near.get(page, 99) <= CLICKS and f"- pages/{page.name}" in sidebar, page.name


LINK = re.compile(r"\]\(([\w./-]+\.(?:qmd|ipynb))?(?:#([\w-]+))?\)")


def test_links_of_pages_lead_somewhere():
    "To a file that is there, and where they name a heading, to one of that page."
    for page in PAGES:
        for name, heading in re.findall(
            r"\]\(([\w./-]+\.(?:qmd|ipynb))?(?:#([\w-]+))?\)", page.read_text()
        ):
            target = (page.parent / name) if name else page
            assert target.exists(), (page.name, name)
            if heading and target.suffix == ".qmd":
                titles = re.findall(r"^#+ (.*)", target.read_text(), re.M)
                slugs = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
                assert heading in slugs, (page.name, name, heading)


# Commands.


def blocks(text: str, kind: str) -> list[str]:
    "The blocks of code of one kind in a text."
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.S | re.M)


def commands(page: Path) -> list[list[str]]:
    "The arguments of each `sae-lora` command on a page."
    lines = "\n".join(blocks(page.read_text(), "sh")).replace("\\\n", " ").splitlines()
    own = [shlex.split(line, comments=True) for line in lines if line.startswith("sae-lora ")]
    return [words[1:] for words in own]


EVERY = [(page, words) for page in PAGES for words in commands(page)]


def name_of(case) -> str:
    return f"{case[0].stem}-{case[1][0]}"


@pytest.mark.parametrize("page, words", EVERY, ids=map(name_of, EVERY))
def test_commands_are_spelled_right(page, words):
    from typer.main import get_command

    from sae_lora.cli import app

    name, *rest = words
    get_command(app).commands[name].make_context(name, rest)


SMALL = {
    "adapt": "--length 16 --rank 2 --tokens 160 --valid-tokens 256",
    "check": "--length 16 --rank 2 --tokens 160 --valid-tokens 256",
    "train-sae": "--width 64 --k 8 --tokens 2048 --batch 128 --text-tokens 2048 --valid-tokens 256",
    "evaluate": "--valid-tokens 256",
    "export": "--length 16",
}


def options(words: list[str]) -> dict[str, list]:
    "The options of a command with their values; those of switches are none."
    found, last = {}, "folder"
    for word in words:
        if word.startswith("--"):
            last = word
            found.setdefault(last, [])
        else:
            found.setdefault(last, []).append(word)
    return found


def tiny(words: list[str], world, case: Path) -> list:
    "A command of a page on the tiny model, with a small budget, in the folder of a case."
    name, *rest = words
    given = options(rest) | {k: [v] for k, v in zip(*[iter(SMALL[name].split())] * 2)}
    given["--text"] = [world / "texts" / "text.jsonl"]
    if name in ("adapt", "check", "train-sae"):
        given["--model"] = [world / "model"]
    if name in ("adapt", "check"):
        asked = given.get("--sae", ["default"])
        scope = [world / "scope" / "res" / "layer_1"]
        given["--sae"] = scope if len(asked) == 1 else [world / "sae", world / "other-sae"]
    if name == "train-sae":
        site = given.get("--site")
        given |= {"--site": [re.sub(r"\d+", "1", site[0])]} if site else {"--layer": ["1"]}
    for place in ("--out", "--to"):
        if place in given:
            given[place] = [case / given[place][0]]
    if name in ("evaluate", "export"):
        copied(world / "run", case)
        given["folder"] = [case / "run"]
    return [name, *given.pop("folder", []), *spelled(given)]


def spelled(given: dict[str, list]) -> list:
    "Options as words."
    words = []
    for option, values in given.items():
        words += [word for value in values for word in (option, value)] if values else [option]
    return words


TRIED = [(page, words) for page, words in EVERY if words[0] in RUN]


@pytest.mark.parametrize("page, words", TRIED, ids=map(name_of, TRIED))
def test_commands_run(page, words, tiny_world):
    case = tiny_world.case()
    ran = tiny_world.start(*tiny(words, tiny_world, case)).wait()
    assert ran.code == 0, told_of(ran, [f"on {page.name}"])
    tiny_world.tidy(case)


# Snippets.

LOCAL_TASK = """
from sae_lora.benchmark_files import local_tasks
TASK = local_tasks("blimp_regular_plural_subject_verb_agreement_1", "data/sample")
"""


@pytest.fixture
def desk(tiny_world, monkeypatch):
    "A folder in which the names that pages use stand for something tiny."
    case = tiny_world.case()
    copied(tiny_world / "run", case)
    (case / "run").rename(case / "my-run")
    (case / "gemma-12").symlink_to(case / "my-run")
    for name, target in {
        "model": tiny_world / "model",
        "my-sae": tiny_world / "sae",
        "data": ROOT / "data",
        "other-text.jsonl": tiny_world / "texts" / "text.jsonl",
        "my-text.jsonl": tiny_world / "texts" / "text.jsonl",
    }.items():
        (case / name).symlink_to(target)
    monkeypatch.chdir(case)
    yield case
    tiny_world.tidy(case)


def shortened(code: str) -> str:
    "A snippet with the names of what is large replaced."
    for large, small in {
        "path/or/hub-id": "model",
        "google/gemma-2-2b": "model",
        "my/model": "model",
        "you/my-adapter": "my-run/adapter",
        "{12: load_sae": "{1: load_sae",
        "tokens=262_144": "tokens=512",
        "length=256": "length=16",
        '["hellaswag"]': "TASK",
    }.items():
        code = code.replace(large, small)
    return code


def executed(page: str, *sections: str) -> dict:
    "What the snippets of a page define, those of the sections with these titles; all by default."
    text = (ROOT / "pages" / f"{page}.qmd").read_text()
    parts = re.split(r"^## ", text, flags=re.M)
    wanted = [p for p in parts if not sections or p.startswith(sections)]
    code = "\n".join(blocks("\n".join(wanted), "python"))
    assert code, (page, sections)
    defined = {}
    exec(compile(shortened(f"{LOCAL_TASK}\n{code}"), page, "exec"), defined)
    return defined


@pytest.mark.parametrize(
    "page, section", [("gemma-scope", "Using"), ("your-own", "In Python"), ("evaluate", "")]
)
def test_snippets_run(page, section, desk, capsys):
    found = executed(page, *filter(None, [section]))
    assert found["lm"] is not None


def test_the_loading_of_a_published_adapter_runs(desk, capsys):
    text = (ROOT / "pages" / "publish.qmd").read_text()
    code = next(c for c in blocks(text, "python") if "load_adapter" in c)
    exec(compile(shortened(code), "publish", "exec"), {})
    assert capsys.readouterr().out


@pytest.fixture
def exported(desk):
    "The same folder, with an export; and logits of the spliced model, with and without the rule."
    import torch

    from sae_lora import load_adapter, splice
    from sae_lora.export import run_export

    run_export("my-run", "elsewhere", "other-text.jsonl", 256, 16)
    own = load_adapter("my-run/adapter")
    ids = own.tok("The tide comes in", return_tensors="pt").to(own.lm.device)
    found = {}
    for keep in ("special", "none"):
        with splice(own.lm, own.saes, keep), torch.no_grad():
            found[keep] = own.lm(**ids).logits
    return found


@pytest.mark.parametrize(
    "sections, keep",
    [(("Plain PEFT",), "special"), (("SAELens",), "none"), (("SAELens", "nnsight"), "special")],
    ids=["peft", "saelens", "nnsight"],
)
def test_elsewhere_gives_the_same(sections, keep, exported):
    import torch

    pytest.importorskip(sections[-1]) if sections[-1] == "nnsight" else None
    found = executed("elsewhere", *sections)["logits"]
    torch.testing.assert_close(found.detach(), exported[keep], rtol=1e-4, atol=1e-4)


def test_transformerlens_reads_an_export(exported):
    found = executed("elsewhere", "SAELens", "TransformerLens")
    assert found["latents"].shape[-1] == found["sae"].cfg.d_sae


def test_troubles_are_told_in_these_words():
    text = (ROOT / "pages" / "limitations.qmd").read_text().split("## Troubleshooting")[1]
    code = "".join(path.read_text() for path in sorted((ROOT / "sae_lora").glob("*.py")))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # a text over several lines is one text
    told = re.findall(r"^\| `([^`]+)`", text, re.M)
    assert len(told) > 8
    for line in told:
        for words in filter(None, map(str.strip, line.split("…"))):
            assert words in code, words
