"""SAEBench's measures are exact where the answer is known.

Loss recovered and explained variance, probing, the removal of latents, and absorption.
"""

import math
import types

import numpy as np
import pytest
import torch
from conftest import random_sae, tiny
from worlds import shared

from sae_lora.absorption import absorbed, absorption
from sae_lora.hidden import hidden
from sae_lora.lora import add_lora, lora_parameters
from sae_lora.metrics import token_losses
from sae_lora.probing import fitted_probe, labelled, pooled, probe, top_latents
from sae_lora.removal import scr, tpp
from sae_lora.saebench import explained_variance, loss_recovered

IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_loss_recovered_of_both_clean_models():
    lm, sae = tiny("llama"), random_sae()
    add_lora(lm, {1: sae}, rank=2)
    for p in lora_parameters(lm).values():
        p.normal_(0, 0.1)
    rows = IDS.clone()
    t = token_losses(lm, {1: sae}, rows)
    mean = {m: float(v.mean()) for m, v in t["ce"].items()}
    base, own = (loss_recovered(lm, {1: sae}, rows, clean=c) for c in ("base", "adapted_unspliced"))
    assert math.isclose(base["ce_clean"], mean["base"], rel_tol=1e-5) and math.isclose(
        base["ce_sae"], mean["spliced"], rel_tol=1e-5
    )
    assert math.isclose(own["ce_clean"], mean["adapted_unspliced"], rel_tol=1e-5) and math.isclose(
        own["ce_sae"], mean["adapted"], rel_tol=1e-5
    )
    assert math.isclose(base["kl_sae"], float(t["kl"]["spliced"].mean()), rel_tol=1e-4)
    assert math.isclose(
        own["loss_recovered"], (own["ce_zero"] - own["ce_sae"]) / (own["ce_zero"] - own["ce_clean"])
    )


def test_explained_variance_of_half_the_error():
    x = torch.randn(2000, 8, dtype=torch.double)
    x -= x.mean(0)
    ev = explained_variance(x, x / 2)
    assert math.isclose(ev["correct"], 0.75, rel_tol=1e-6) and math.isclose(
        ev["legacy"], 0.75, rel_tol=1e-6
    )


def test_probe_finds_what_is_there_and_nothing_else():
    g = torch.Generator().manual_seed(1)
    y = np.repeat(["a", "b", "c", "d"], 50)
    F = torch.rand(200, 30, generator=g)
    assert probe(F, y, (1,))[1]["ci95"][0] < 0.55
    for i, c in enumerate("abcd"):
        F[:, i] += torch.as_tensor(y == c) * 1.0
    found = probe(F, y, (1, None))
    assert (
        found[1]["accuracy"] >= 0.95 and found[None]["accuracy"] > 0.9 and found[1]["n"] == 4 * 30
    )
    assert probe(F, y, (1,), seed=3) == probe(F, y, (1,), seed=3)


def test_probing_news(clean):
    lm, tok, saes, _ = clean
    texts, y = labelled(shared("ag_news") / "test.csv", n=40)
    assert sorted(set(y)) == ["1", "2", "3", "4"] and len(texts) == 160
    X, F = pooled(lm, tok, saes[14], 14, texts, length=48)
    assert probe(X, y, (None,))[None]["accuracy"] > 0.75 and probe(F, y, (5,))[5]["accuracy"] > 0.6


@torch.no_grad()
def test_pooled_is_the_mean_over_the_text_alone(clean):
    lm, tok, saes, _ = clean
    X, F = pooled(
        lm,
        tok,
        saes[14],
        14,
        ["Tides.", "A much longer text than the first, so that the first is padded."],
    )
    ids = torch.tensor(
        [[tok.get_vocab()["<|endoftext|>"], *tok("Tides.", add_special_tokens=False).input_ids]]
    )
    h = hidden(lm, {"input_ids": ids}, 14)[0, 1:]
    torch.testing.assert_close(X[0], h.mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(F[0], saes[14].encode(h).mean(0), rtol=1e-3, atol=1e-3)


def test_tpp_where_one_latent_serves_two_classes():
    "Removing it hurts the other class as much: nothing is targeted."
    y, D = np.repeat([0, 1, 2, 3], 60), torch.eye(5)
    F = torch.zeros(240, 5)
    F[:, 0] = torch.as_tensor((y == 0) | (y == 1)) * 3.0
    F += torch.rand(240, 5, generator=torch.Generator().manual_seed(0)) * 1e-3
    assert abs(tpp(F @ D, F, D, y, n=1)["tpp"]) < 0.2
    own = torch.nn.functional.one_hot(torch.as_tensor(y), 5) * 3.0
    assert tpp(own @ D, own, D, y, n=1) == {"tpp": 0.5, "intended": 0.5, "unintended": 0.0}


def test_scr_is_zero_where_the_wrong_latents_go_and_where_nothing_was_lost():
    a, b = np.array([0, 0, 1, 1] * 40), np.array([0, 1, 0, 1] * 40)
    F = torch.stack(
        [torch.as_tensor(v) * s for v, s in ((a, 1.0), (1 - a, 1.0), (b, 2.0), (1 - b, 2.0))], 1
    ).float()
    assert scr(F, F, torch.eye(4), a, b, n=2)["scr"] == 1.0
    loud = F * torch.tensor([4.0, 4.0, 0.1, 0.1])
    assert scr(loud, loud, torch.eye(4), a, b, n=2)["scr"] == 0.0


def test_absorption_of_a_real_letter(clean):
    lm, tok, saes, _ = clean
    found = absorption(lm, tok, saes[14], 14, letters="sm", n=24)
    assert set(found["letters"]) | set(found["left_out"]) == set("sm")
    for r in found["letters"].values():
        assert 0 <= r["full"] <= 1 and 0 <= r["fraction"] <= 1 and 1 <= len(r["main"]) <= 10


def test_absorption_agrees_with_sae_bench():
    pytest.importorskip("sae_bench")
    from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator

    g = torch.Generator().manual_seed(0)
    D, p = (
        torch.nn.functional.normalize(torch.randn(40, 16, generator=g), dim=1),
        torch.randn(16, generator=g),
    )
    f = torch.rand(64, 40, generator=g) * (torch.rand(64, 40, generator=g) < 0.15)
    f[:, :2] *= torch.rand(64, 1, generator=g) < 0.3
    x = f @ D + 0.6 * torch.nn.functional.normalize(p, dim=0)
    words = [f"w{i}" for i in range(64)]
    model = types.SimpleNamespace(
        to_tokens=lambda s: torch.zeros(1, 3),
        run_with_cache=lambda prompts, names_filter: (
            None,
            {names_filter[0]: x[[int(s.rsplit("w", 1)[1][:-1]) for s in prompts]][:, None]},
        ),
    )
    sae = types.SimpleNamespace(
        W_dec=D,
        device="cpu",
        encode=lambda h: torch.stack([f[(x - r).abs().sum(1).argmin()] for r in h]),
    )
    calculator = FeatureAbsorptionCalculator(
        model=model, icl_word_list=["a"], max_icl_examples=0, word_token_pos=0
    )
    theirs = calculator.calculate_absorption(
        sae, words, p, [0, 1], layer=0, show_progress=False
    ).word_results
    full, fraction = absorbed(x, f, D, p, [0, 1])
    positive = x @ p > 0  # theirs is asked about words that the probe finds
    assert positive.sum() > 30
    for i in torch.where(positive)[0].tolist():
        assert bool(full[i]) == theirs[i].is_full_absorption and math.isclose(
            float(fraction[i]), theirs[i].absorption_fraction, abs_tol=1e-5
        )


def test_choice_of_latents_and_removal_agree_with_sae_bench():
    pytest.importorskip("sae_bench")
    from sae_bench.evals.scr_and_tpp.main import create_tpp_plotting_dict
    from sae_bench.evals.sparse_probing.probe_training import (
        get_top_k_mean_diff_mask,
        train_sklearn_probe,
    )

    g = torch.Generator().manual_seed(0)
    F, y = torch.rand(200, 30, generator=g), torch.arange(200) % 2 == 0
    from sae_bench.sae_bench_utils import dataset_info

    theirs = get_top_k_mean_diff_mask(
        F, torch.where(y, dataset_info.POSITIVE_CLASS_LABEL, dataset_info.NEGATIVE_CLASS_LABEL), 4
    )
    assert set(top_latents(F, y, 4).tolist()) == set(torch.where(~theirs)[0].tolist())
    F[y, 3] += 0.4
    model, _ = train_sklearn_probe(F[:100], y[:100].long(), F[100:], y[100:].long())
    ours = fitted_probe(F[:100], y[:100])
    np.testing.assert_allclose(model.coef_, ours.coef_, atol=1e-4)
    clean, fall = (
        {"a": 0.9, "b": 0.8},
        {"a": {10: {"a": 0.5, "b": 0.75}}, "b": {10: {"a": 0.85, "b": 0.6}}},
    )
    overall, _ = create_tpp_plotting_dict(fall, clean)
    assert math.isclose(overall["tpp_threshold_10_total_metric"], ((0.4 - 0.05) + (0.2 - 0.05)) / 2)
