"""Adapting a model in one command: its budget, its report, the card, and what a failure leaves."""

import json
import math

import pytest
from conftest import random_sae, tiny
from worlds import AFTER_EOS, GOOD, tokenizer

from sae_lora import adapt, sae_run
from sae_lora.adapters import save_adapter, saved_along
from sae_lora.lora import add_lora
from sae_lora.metrics import fidelity
from sae_lora.model_card import no_share, won_back
from sae_lora.report import sentence

SHARES = dict(
    gap=0.1,
    gap_closed=0.443,
    kl_closed=0.161,
    ci95=dict(gap=[0.08, 0.12], gap_closed=[0.359, 0.547], kl_closed=[0.14, 0.18]),
)


def test_what_check_and_measuring_take_over_a_minute_training_gives_up():
    assert adapt.budget(GOOD, 3, 2048) == 90 * 512  # 30 s of check, 20 s of measuring
    assert adapt.budget(GOOD, 3, 8192) == 64 * 512  # 30 and 82 s
    assert adapt.budget(GOOD, 0.01, 8192) == 2**13


def test_the_disk_has_room_for_saes_that_go_along(monkeypatch, tmp_path):
    saes, needs = {1: random_sae()}, []
    monkeypatch.setattr(adapt, "room", lambda folder, need: needs.append(need))
    adapt._announce(tmp_path, saes, dict(state_bytes=100), told=None)
    assert saved_along(saes) > 0 and needs == [300 + saved_along(saes)]


def test_both_shares_are_told():
    assert (
        won_back(SHARES)
        == "the adapter wins back 44 % of that in cross-entropy (95% interval 36 to 55 %), "
        "16 % in KL (14 to 18 %)"
    )
    assert no_share(SHARES) is None
    r = SHARES | dict(model="m", text="t", valid_tokens=8192, saes=[dict(layer=6), dict(layer=14)])
    assert sentence(r).startswith(
        "Splicing the SAEs in at layers 6, 14 of m costs 0.100 nats per token "
        "(95% interval 0.080 to 0.120) on 8,192 held-out tokens of t text; "
    )


@pytest.mark.parametrize(
    "gap, ends, words",
    [
        (0.001, [-0.002, 0.004], "within its interval of zero"),
        (0.0, [0.0, 0.0], "within its interval of zero"),
        (-0.1, [-0.2, -0.1], "not above zero"),
    ],
)
def test_a_share_of_nothing_is_not_told(gap, ends, words):
    r = SHARES | dict(gap=gap, gap_closed=-math.inf, ci95=SHARES["ci95"] | dict(gap=ends))
    assert words in no_share(r) and words in won_back(r) and "inf" not in won_back(r)
    assert won_back(r).endswith(
        "no share of it is told; the adapter wins back 16 % in KL (95% interval 14 to 18 %)"
    )
    assert "KL" not in won_back(r | dict(kl_closed=math.nan))
    assert "0 % in KL (0 to 2 %)" in won_back(
        SHARES | dict(kl_closed=0.004, ci95=SHARES["ci95"] | dict(kl_closed=[-0.002, 0.02]))
    )


@pytest.mark.parametrize("low", [0.08, -0.08])  # a gap above zero, and one not told from it
@pytest.mark.parametrize(
    "kl, ends, harms",
    [
        (-0.04, [-0.08, -0.02], True),
        (-0.04, [-0.08, 0.02], False),
        (math.nan, [math.nan, math.nan], False),
    ],
)
def test_an_adapter_that_does_harm_is_told(low, kl, ends, harms):
    intervals = SHARES["ci95"] | dict(gap=[low, 0.12], kl_closed=ends)
    said = won_back(SHARES | dict(kl_closed=kl, ci95=intervals))
    assert said.endswith("so try a lower learning rate (lr)") == harms


def test_the_adapters_card_tells_both(tmp_path):
    lm, saes = tiny("llama"), {1: random_sae()}
    add_lora(lm, saes, rank=2)
    save_adapter(
        lm,
        saes,
        tmp_path / "adapter",
        metrics=fidelity(lm, saes, AFTER_EOS) | SHARES | dict(text="some"),
    )
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert (
        "On some text the splice costs 0.100 nats per token; the adapter wins back 44 %" in card
        and "16 % in KL (14 to 18 %)" in card
    )
    assert "| adapted, unspliced |" in card and "| base |" in card and "| – |" in card


def test_an_sae_is_kept_when_its_measurement_fails(tmp_path, monkeypatch):
    from sae_lora.formats import load_sae

    def fails(*args):
        raise RuntimeError("no memory left")

    lm, tok = tiny("llama"), tokenizer()
    monkeypatch.setattr(sae_run, "load_lm", lambda *a, **k: (lm, tok))
    monkeypatch.setattr(sae_run, "measure_sae", fails)
    texts = tmp_path / "texts.jsonl"
    lines = []
    for i in range(1, 400):
        text = " ".join(f"w{(i * j) % 90 + 5}" for j in range(1, 60))
        lines.append(json.dumps(text))
    texts.write_text("\n".join(lines))
    options = dict(
        layer=1, width=64, k=4, tokens=2048, text_tokens=4096, batch=256, valid_tokens=256
    )
    with pytest.raises(RuntimeError, match="no memory"):
        sae_run.run_train_sae(tmp_path / "sae", "tiny", str(texts), **options)
    assert load_sae(tmp_path / "sae").cfg.k == 4
    assert "Not measured yet" in (tmp_path / "sae" / "README.md").read_text()
    assert not (tmp_path / "sae" / "report.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(sae_run, "load_lm", lambda *a, **k: (lm, tok))
    weights = (tmp_path / "sae" / "sae_weights.safetensors").read_bytes()
    report = sae_run.run_train_sae(tmp_path / "sae", "tiny", str(texts), resume=True, **options)
    assert (
        report["tokens"] == 2048
        and "ce" in report
        and (tmp_path / "sae" / "sae_weights.safetensors").read_bytes() == weights
    )
    assert {p.name for p in (tmp_path / "sae").iterdir()} == {
        "README.md",
        "cfg.json",
        "report.json",
        "sae_weights.safetensors",
    }
