"""The explorer: records against a reference, and a page that is small, safe and works by itself."""

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import pytest
import torch
from conftest import ROOT, random_sae, tiny
from device_entries import tokenizer

from sae_lora.explorer import (
    ALPHA,
    COMPARED,
    OPEN,
    PROMPT,
    RECORDS,
    WRITTEN,
    explored,
    explorer_files,
    explorer_html,
    explorer_page,
    read_explored,
    save_explorer,
)
from sae_lora.files import UsageError
from sae_lora.lm import decoder_blocks
from sae_lora.lora import add_lora, lora_parameters, without_lora
from sae_lora.text import text_rows

KEPT = ROOT / "data" / "latents"
SPECIAL = (0, 1, 2)
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def small():
    "A tiny model with an adapter on all layers, its tokenizer, an SAE, rows."
    lm, sae = tiny("llama"), random_sae(d_sae=64)
    add_lora(lm, {1: sae}, rank=2, layers="all")
    g = torch.Generator().manual_seed(0)
    for p in lora_parameters(lm).values():
        p.data.normal_(0, 0.2, generator=g)
    rows = torch.randint(9, 97, (6, 16), generator=g)
    rows[:, 0] = rows[2, 7] = 1
    return lm, tokenizer(), sae, rows


@pytest.fixture(scope="module")
def found(small):
    lm, tok, sae, rows = small
    return explored(lm, tok, {1: sae}, 1, rows, latents=16, steered=3)


def reference(lm, sae, rows) -> torch.Tensor:
    "Activations `(positions, latents)` at all positions of text."
    with torch.no_grad():
        h = lm(input_ids=rows, output_hidden_states=True).hidden_states[2]
    text = (torch.arange(rows.shape[1]) > 0) & ~torch.isin(rows, torch.tensor(SPECIAL))
    return sae.encode(h)[text]


def test_records_are_what_the_definitions_say(small, found):
    lm, _, sae, rows = small
    after = reference(lm, sae, rows)
    with without_lora(lm):
        before = reference(lm, sae, rows)
    shown = [r["latent"] for r in found["latents"]]
    assert len(shown) == len(set(shown)) == 16
    for record in found["latents"]:
        a, b = before[:, record["latent"]], after[:, record["latent"]]
        change = 1 - torch.minimum(a, b).sum() / torch.maximum(a, b).sum()
        assert abs(record["change"] - float(change)) < 1e-3
        assert record["rate"] == {
            model: pytest.approx(float((f > 0).float().mean()))
            for model, f in zip(COMPARED, (a, b))
        }
        peaks = [max(p[COMPARED[0]]) for p in record["passages"]]
        assert peaks == sorted(peaks, reverse=True)
        assert not peaks or peaks[0] == pytest.approx(float(a.max()), abs=0.006)
    changes = [r["change"] for r in found["latents"]]
    assert changes == sorted(changes, reverse=True)
    every = (torch.maximum(before, after) - torch.minimum(before, after)).sum(0)
    every = every / torch.maximum(before, after).sum(0).clamp_min(1e-9)
    assert changes[:4] == pytest.approx(every.topk(4).values.tolist(), abs=1e-3)
    assert found["about"]["often"] == int(((before > 0) | (after > 0)).any(0).sum())
    assert sum(found["about"]["histogram"]) == found["about"]["often"]


@torch.no_grad()
def written_out(lm, tok, d=None) -> str:
    "What a model writes after the prompt, one pass over everything for each token."

    def push(module, args, output):
        h = output[0] if isinstance(output, tuple) else output
        moved = ~torch.isin(ids, torch.tensor(SPECIAL)) & (torch.arange(ids.shape[1]) > 0)
        h += ALPHA * (h @ d)[..., None] * d * moved[..., None]

    ids = text_rows([PROMPT], tok, 256)
    start = ids.shape[1]
    hook = decoder_blocks(lm)[1].register_forward_hook(push) if d is not None else None
    for _ in range(WRITTEN):
        ids = torch.cat([ids, lm(ids).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == 2:
            break
    if hook:
        hook.remove()
    return tok.decode(ids[0, start:], skip_special_tokens=True)


def test_the_steered_models_write_what_they_should(small, found):
    lm, tok, sae, _ = small
    assert [("steered" in r) for r in found["latents"]] == [True] * 3 + [False] * 13
    plain = written_out(lm, tok)
    assert found["about"]["plain"][COMPARED[1]] == plain
    with without_lora(lm):
        assert found["about"]["plain"][COMPARED[0]] == written_out(lm, tok)
    for record in found["latents"][:3]:
        d = torch.nn.functional.normalize(sae.W_dec[record["latent"]], dim=0)
        assert record["steered"][COMPARED[1]] == written_out(lm, tok, d)
        with without_lora(lm):
            assert record["steered"][COMPARED[0]] == written_out(lm, tok, d)


def test_too_little_text_is_a_mistake(small):
    lm, tok, sae, rows = small
    with pytest.raises(UsageError, match="give more rows"):
        explored(lm, tok, {1: sae}, 1, rows[:1, :1], latents=4, steered=0)


class Tags(HTMLParser):
    "The tags of a page, and the addresses that it loads."

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.loads = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        given = dict(attrs)
        self.loads += [given[k] for k in ("src", "srcset", "data", "poster") if k in given]
        self.loads += [given["href"]] if tag != "a" and "href" in given else []


def evil(found: dict) -> dict:
    "The same, with tokens that would be tags."
    token = "<script>alert(1)</script>"
    text = json.loads(json.dumps(found))
    for record in text["latents"]:
        record["promotes"][0] = record["suppresses"][0] = token
        for passage in record["passages"] + record["also"]:
            passage["tokens"] = [t and token + "&<b>" for t in passage["tokens"]]
        for model in record.get("steered", {}):
            record["steered"][model] = token
    return text


def test_what_a_text_says_is_never_markup(found):
    bad = evil(found)
    page = Tags(explorer_page(bad))
    assert page.tags.count("script") == 1 and not page.loads
    assert page.tags.count("b") == Tags(explorer_page(found)).tags.count("b")
    assert Tags(explorer_html(bad)).tags == ["iframe"]
    for name, data in explorer_files(bad).items():
        if name.endswith(".js"):
            bodies = json.loads(re.fullmatch(r"passages\((.*)\);\n", data.decode(), re.S)[1])
            assert all("script" not in Tags(body).tags for body in bodies.values())


def test_files_come_back_as_they_were_written(found, tmp_path):
    page = save_explorer(tmp_path / "latents", found)
    assert read_explored(page.parent) == found
    (page.parent / RECORDS).write_bytes(b"damaged")
    with pytest.raises(UsageError, match="give a folder that write_explorer wrote"):
        read_explored(page.parent)
    with pytest.raises(UsageError, match="give a folder that write_explorer wrote"):
        read_explored(tmp_path)


def test_the_committed_page_is_small_whole_and_current():
    "At least 400 latents, under 1 MB at first, nothing from elsewhere, drawn from its records."
    found = read_explored(KEPT)
    sizes = {p.name: p.stat().st_size for p in KEPT.iterdir()}
    assert sizes["index.html"] < 2**20 and sum(sizes.values()) < 1.5 * 2**20, sizes
    for name, data in explorer_files(found).items():
        if name != RECORDS:
            assert (KEPT / name).read_bytes() == data, name
    page = (KEPT / "index.html").read_text()
    tags = Tags(page)
    assert len(found["latents"]) >= 400 and tags.tags.count("details") == len(found["latents"])
    assert page.count(" open>") == OPEN and "<noscript>" in page
    assert not tags.loads
    style = re.search(r"<style>(.*?)</style>", page, re.S)[1]
    assert "url(" not in style and "@import" not in style
    changes = [r["change"] for r in found["latents"]]
    assert changes == sorted(changes, reverse=True)
    assert all("steered" in r for r in found["latents"][:OPEN])
    about = found["about"]
    assert about["run"]["layers"] == "all" and about["provenance"]["sae_lora"]


def luminance(colour: tuple) -> float:
    parts = [c / 255 for c in colour]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple, other: tuple) -> float:
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def colours(block: str) -> dict[str, tuple]:
    found = re.findall(r"--(\w+): #(\w\w)(\w\w)(\w\w)", block)
    by_name = {}
    for name, *rgb in found:
        by_name[name] = tuple(int(c, 16) for c in rgb)
    return by_name


def test_text_stands_out_in_light_and_dark():
    "At 4.5 to 1 or more, also on the deepest shade."
    light, dark = (ROOT / "data" / "explorer" / "explorer.css").read_text().split("@media", 1)
    for named in (colours(light), colours(dark.split("* {")[0])):
        for back in ("paper", "card", "chip"):
            for text in ("ink", "muted", "before", "after"):
                assert contrast(named[text], named[back]) >= 4.5, (text, back)
        shade = [0.405 * s + 0.595 * c for s, c in zip((56, 132, 255), named["card"])]
        assert contrast(named["ink"], tuple(shade)) >= 4.5


DRIVEN = """<script>
const wait = ms => new Promise(done => setTimeout(done, ms));
const shown = () => items.filter(i => !i.hidden).map(i => i.dataset.latent);
const placed = () => [...list.children].map(i => i.dataset.latent);
const type = text => { field.value = text; field.dispatchEvent(new Event("input")); };
const choose = way => { order.value = way; order.dispatchEvent(new Event("change")); };
addEventListener("load", async () => {
  const said = { first: placed(), open: items.filter(i => i.open).map(i => i.dataset.latent) };
  said.scroll = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  choose("before down"); said.rate = placed();
  choose("change up"); said.change = placed();
  items.at(-1).open = true; await wait(500); said.body = items.at(-1).textContent;
  type("WORD"); await wait(500); said.word = shown();
  type("nowhere to be found"); said.none = shown(); said.told = told.value;
  document.body.innerHTML = "";
  document.body.append(Object.assign(document.createElement("pre"),
    { id: "said", textContent: JSON.stringify(said) }));
});
</script></body>"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_searching_and_sorting_in_a_browser(found, tmp_path):
    "From a file, without a server; also what is in the passages of a latent not yet opened."
    latents = found["latents"]
    word = "unheardof"
    latents[-1]["passages"][0]["tokens"][0] = word
    page = save_explorer(tmp_path / "latents", found)
    page.write_text(page.read_text().replace("</body>", DRIVEN.replace("WORD", word)))
    command = "--headless --no-sandbox --disable-gpu --no-first-run --window-size=390,900".split()
    command += ["--virtual-time-budget=8000", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [CHROMIUM, *command, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    dom = re.search(r'<pre id="said">([^<]*)</pre>', done.stdout)
    assert dom, (done.stdout[-500:], done.stderr[-2000:])
    said = json.loads(unescape(dom[1]))
    ids = [str(r["latent"]) for r in latents]
    assert said["first"] == ids and said["open"] == ids[:OPEN] and said["scroll"] <= 0
    by_rate = sorted(latents, key=lambda r: -r["rate"][COMPARED[0]])
    assert said["rate"] == [str(r["latent"]) for r in by_rate]
    changes = {str(r["latent"]): r["change"] for r in latents}
    assert [changes[i] for i in said["change"]] == sorted(changes.values())
    assert word in said["body"] and said["word"] == [ids[-1]]
    assert said["none"] == [] and said["told"] == f"0 of {len(ids)} latents"
