"""How far two models' latents agree, and the cards that show them side by side."""

import json
import math

import torch
from conftest import random_sae, tiny

from sae_lora import agreement as agreement_module
from sae_lora.agreement import agreement, latent_changes
from sae_lora.cards import cards_page, latent_cards
from sae_lora.hidden import hidden
from sae_lora.latents import firing, latents_in_model
from sae_lora.lora import add_lora, lora_parameters, without_lora
from sae_lora.splice import splice

IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS}


def test_agreement_is_jaccard(monkeypatch):
    "Two models whose latents are set by hand: 1 of 3, then 2 of 2, then none in either."
    lm, sae = tiny("llama"), random_sae(d_sae=64)
    a, b = torch.zeros(2, 12, 64), torch.zeros(2, 12, 64)
    a[0, 1, [0, 1]] = b[0, 1, [1, 2]] = 1.0
    a[1, 5, [4, 5]] = b[1, 5, [4, 5]] = 1.0
    monkeypatch.setattr(
        agreement_module,
        "latents_in_model",
        lambda lm, saes, layer, rows, model, keep: (
            {"base": a, "spliced": b}[model],
            torch.ones(2, 12, dtype=torch.bool),
        ),
    )
    got = agreement(lm, {1: sae}, IDS, compare=("base", "spliced"), top=1)[1]
    assert (
        math.isclose(got["jaccard"], (1 / 3 + 1) / 2)
        and got["latents"] == 3
        and got["top_overlap"] == 1
        and got["positions"] == 24
    )


@torch.no_grad()
def test_an_earlier_splice_moves_what_a_later_sae_sees():
    lm, saes = tiny("llama"), {0: random_sae(), 2: random_sae(seed=1)}
    got = agreement(lm, saes, IDS, compare=("base", "spliced"))
    assert got[0]["jaccard"] == 1 and got[2]["jaccard"] < 1
    with splice(lm, {0: saes[0]}):
        h = hidden(lm, BATCH, 2)
    seen, real = latents_in_model(lm, saes, 2, IDS, "spliced", "special")
    torch.testing.assert_close(
        seen[:, 1:], (saes[2].encode(h) * real[..., None])[:, 1:], rtol=1e-4, atol=1e-4
    )


def test_change_is_one_less_the_weighted_jaccard_index(adapted):
    "Against the definition, a latent at a time; and 0 where the adapter moves nothing."
    lm, _, saes, blocks = adapted
    rate, change = latent_changes(lm, saes, 14, blocks.valid[:2])
    assert rate.shape == (2, 4608) and torch.equal(rate[0], rate[1]) and not change.any()
    lm.delete_adapter("default")
    add_lora(lm, saes, rank=2, layers="all")
    for p in lora_parameters(lm).values():
        p.data.normal_(0, 0.03, generator=torch.Generator().manual_seed(0))
    rate, change = latent_changes(lm, saes, 14, blocks.valid[:2], batch=1)
    both = [latents_in_model(lm, saes, 14, blocks.valid[:2], m)[0] for m in ("base", "adapted")]
    counts = torch.ones(both[0].shape[:2], dtype=torch.bool)
    for f in both:  # no position that is ten times as strong as the middle one of its row
        sums = f.sum(-1)
        counts &= sums < 10 * sums.median(1, keepdim=True).values
    assert 0 < (~counts).sum() < 10
    a, b = (f.flatten(0, 1) for f in both)
    for latent in torch.cat([change.topk(3).indices, (a > 0).sum(0).topk(3).indices]).tolist():
        pairs = list(zip(a[:, latent].tolist(), b[:, latent].tolist()))
        usual = [pair for pair, counted in zip(pairs, counts.flatten()) if counted]
        same = sum(min(pair) for pair in usual) / sum(max(pair) for pair in usual)
        assert math.isclose(change[latent], 1 - same, abs_tol=1e-5)
        fires = sum(x > 0 for x, _ in pairs) / int((a > 0).any(1).sum())
        assert math.isclose(rate[0, latent], fires, abs_tol=1e-6)


def test_passages_are_whole_words_of_documents_that_are_told_apart(clean):
    lm, tok, saes, _ = clean
    end = tok("<|endoftext|>").input_ids
    first = tok(" Nobody saw the counterrevolutionary café☃").input_ids
    rows = torch.tensor([end + first + end + tok("Separately, unhappily").input_ids])
    f = firing(lm, saes[14], 14, rows, list(range(4608)))[0]
    for latent in f.amax(0).topk(20).indices.tolist():
        (card,) = latent_cards(lm, tok, saes, {14: [latent]}, rows, ("base", "spliced"), n=1)
        (passage,) = card["passages"]
        before, after = "".join("|" if t is None else t for t in passage["tokens"]).split("|")
        assert " Nobody saw the counterrevolutionary café☃".endswith(before) and before[0] in " ☃"
        assert after == "Separately, unhappily"
        assert max(passage["base"]) == round(float(f[:, latent].max()), 2) and not card["also"]


def test_cards_are_json_and_show_both_models(adapted):
    lm, tok, saes, blocks = adapted
    with without_lora(lm), torch.no_grad():
        f = saes[14].encode(hidden(lm, {"input_ids": blocks.valid[:4]}, 14)[:, 1:])
    latent = int((f > 0).float().mean((0, 1)).argmax())
    (card,) = json.loads(
        json.dumps(latent_cards(lm, tok, saes, {14: [latent]}, blocks.valid[:4], n=2))
    )
    assert (
        card["rate"]["base"] == card["rate"]["adapted"] > 0 and card["top_overlap"] == 1
    )  # the adapter is after the SAE
    assert (
        len(card["passages"]) == 2
        and card["passages"][0]["base"] == card["passages"][0]["adapted"]
        and max(card["passages"][0]["base"]) > 0
    )
    assert (
        max(card["passages"][0]["base"]) >= max(card["passages"][1]["base"])
        and len(card["promotes"]) == 8
    )


def test_a_page_of_cards_is_searchable_and_escapes_what_it_shows():
    card = dict(
        layer=1,
        latent=7,
        rate=dict(base=0.01, adapted=0.02),
        top_overlap=0.5,
        promotes=["<b>", " x"],
        suppresses=["y"],
        passages=[
            dict(tokens=["<i>", "a\n"], base=[2.0, 0.0], adapted=[1.0, 0.0]),
            dict(tokens=["same"], base=[1.0], adapted=[1.0]),
        ],
    )
    page = cards_page([card, card | dict(latent=8)])
    assert (
        page.count("<details>") == 2
        and 'type="search"' in page
        and "&lt;i&gt;" in page
        and "<i>" not in page
        and "<b>" not in page.replace("<b>latent", "")
    )
    assert (
        page.count("<p class=passage>") == 4 and "--a:9;--b:4>&lt;i&gt;</i>a⏎" in page
    )  # a passage stands once, with a shade for the one model and a line for the other
