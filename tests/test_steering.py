"""Steering and its scores are what their formulas say."""

import inspect
import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import random_sae, tiny
from worlds import PAIRS, shared

from sae_lora.files import UsageError
from sae_lora.hidden import hidden
from sae_lora.latents import positives
from sae_lora.lora import add_lora, without_lora
from sae_lora.metrics import bootstrap, token_losses
from sae_lora.splice import Identity
from sae_lora.steering import log_likelihoods, mean_interval, steer, steering_effect, tune_alpha

IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS}


def test_steering_is_its_formula_and_leaves_no_trace(any_lm):
    sae = random_sae()
    with torch.no_grad():
        h, full = hidden(any_lm, BATCH, 1), any_lm(**BATCH).logits
        d = sae.W_dec[5] / sae.W_dec[5].norm()
        with steer(any_lm, sae, 1, 5, 0.7):
            steered = hidden(any_lm, BATCH, 1)
        torch.testing.assert_close(steered, h + 0.7 * (h @ d)[..., None] * d, rtol=1e-4, atol=1e-4)
        with steer(any_lm, sae, 1, 5, 0.7, keep="special"):
            assert torch.equal(hidden(any_lm, BATCH, 1)[:, 0], h[:, 0])
        with steer(any_lm, sae, 1, 5, 0.7, size=2.0):
            steered = hidden(any_lm, BATCH, 1)
        torch.testing.assert_close(steered, h + 1.4 * d, rtol=1e-4, atol=1e-4)
        with pytest.raises(ZeroDivisionError), steer(any_lm, sae, 1, 5, 0.7):
            1 / 0
        assert torch.equal(any_lm(**BATCH).logits, full)
        with steer(any_lm, sae, 1, 5, 0.0):
            torch.testing.assert_close(any_lm(**BATCH).logits, full)


@torch.no_grad()
@pytest.mark.parametrize("sets", [dict(positive=["w5"]), dict(first=["w5"], second=["w6"])])
def test_sets_that_have_no_two_sides_are_refused(sets):
    lm = tiny("llama")
    with pytest.raises(UsageError, match="give `positive` and at least one other"):
        tune_alpha(lm, None, None, sets)
    with pytest.raises(UsageError, match="give `positive` and at least one other"):
        steering_effect(lm, None, None, sets, alpha=1.0)


def test_log_likelihood_fixed_and_as_published():
    """Against both written out for one text at a time.

    The published one scores a token at its own position.
    """
    lm = tiny("llama")
    rows = IDS.clone()
    rows[1, 7:] = -1
    ours = log_likelihoods(lm, rows)
    for i, n in enumerate((12, 7)):
        log_probs, tokens = lm(rows[i : i + 1, :n]).logits[0].log_softmax(-1), rows[i, :n]
        fixed = log_probs[:-1].gather(1, tokens[1:, None]).mean()
        published = log_probs[1:].gather(1, tokens[1:, None]).mean()
        torch.testing.assert_close(ours["fixed"][i], fixed, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours["published"][i], published, rtol=1e-4, atol=1e-4)
    loss = token_losses(lm, {1: Identity(32)}, rows)
    torch.testing.assert_close(
        -ours["fixed"], loss["ce"]["base"].sum(1) / loss["real"].sum(1), rtol=1e-4, atol=1e-4
    )


def test_steering_effect_of_an_untrained_adapter_is_none(clean):
    lm, tok, saes, blocks = clean
    add_lora(lm, saes, rank=1)
    sets = {
        "positive": [a for a, _ in PAIRS],
        "law": ["The court is closed.", "A lease must be in writing."],
        "verse": ["O good convey!", "My lord, I dare not."],
    }
    push = partial(steer, lm, saes[14], 14, 3)
    effect = steering_effect(lm, tok, push, sets, 0.5)
    for kind in ("fixed", "published"):
        for side, n in (("positive", 4), ("negative", 4)):
            assert (
                effect[kind][side]["difference"] == {"mean": 0.0, "ci90": [0.0, 0.0], "n": n}
                and effect[kind][side]["base"]["mean"] != 0
            )
    assert tune_alpha(lm, tok, push, sets, alphas=(0.0, 0.5))[1][0.0] == 0


def test_steering_on_the_negatives_of_the_paper(adapted):
    lm, tok, saes, blocks = adapted
    sets = {
        p.stem: json.loads(p.read_text())["examples"][:6]
        for p in sorted(shared("steering").glob("*.json"))
    }
    assert set(sets) == {"law", "arabic", "biology", "recipes", "shakespeare"}
    with without_lora(lm):
        found = positives(lm, tok, saes[14], 14, 524, blocks.valid, n=8)
    assert found and all(t.strip() for t in found)
    push = partial(steer, lm, saes[14], 14, 524)
    on = {"positive": found[::2], "biology": sets.pop("biology")}
    alpha, _ = tune_alpha(lm, tok, push, on, alphas=(0.1, 1.0))
    effect = steering_effect(lm, tok, push, {"positive": found[1::2]} | sets, alpha)
    assert (
        effect["fixed"]["negative"]["difference"]["n"] == 24
        and effect["fixed"]["negative"]["base"]["ci90"][0]
        <= effect["fixed"]["negative"]["base"]["ci90"][1]
    )


def test_intervals_of_a_mean_are_one_and_the_same():
    "At any level, and close to what scipy's bootstrap gives of the same numbers."
    from scipy import stats

    x = torch.randn(40, generator=torch.Generator().manual_seed(0)).double()
    seed = "rng" if "rng" in inspect.signature(stats.bootstrap).parameters else "random_state"
    options = {"confidence_level": 0.9, "method": "percentile", seed: 0}
    theirs = stats.bootstrap((x.numpy(),), np.mean, **options).confidence_interval
    ours = mean_interval(x)
    assert ours["mean"] == float(x.mean()) and ours["n"] == 40
    assert np.allclose(ours["ci90"], [theirs.low, theirs.high], atol=0.02)

    def mean(w):
        return w @ x / 40

    assert mean_interval(x, level=0.95)["ci95"] == bootstrap(mean, 40, samples=10_000)
    assert bootstrap(mean, 40) == bootstrap(mean, 40, level=0.95)
    assert mean_interval(x[:1]) == {"mean": float(x[0]), "ci90": [None, None], "n": 1}
