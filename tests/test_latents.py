"""Latents of an SAE in a model: where they are active, what they promote, which are chosen."""

import types

import pytest
import torch
from conftest import random_sae, tiny

from sae_lora.files import UsageError
from sae_lora.latents import (
    decoder,
    latents_at,
    output_scores,
    passages,
    persistence,
    promotes,
    some_latents,
)
from sae_lora.lm import head, stack


def test_passages_are_windows_about_peaks():
    acts = torch.zeros(4, 9)
    acts[0, 0] = 1.0
    acts[2, 8] = 3.0
    acts[3, 4] = 2.0
    assert passages(acts, 5, 4) == [(2, 5, 9), (3, 2, 6), (0, 0, 4)] and passages(acts, 1, 100) == [
        (2, 0, 9)
    ]


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "gpt_neox", "bloom"])
@torch.no_grad()
def test_what_a_latent_promotes_goes_through_the_final_norm(name):
    lm, sae = tiny(name), random_sae()
    norm = [
        m
        for m in stack(lm).children()
        if getattr(m, "weight", None) is not None and m.weight.dim() == 1
    ][-1]
    norm.weight.normal_()
    gain = norm.weight + 1 if name == "gemma" else norm.weight
    tok = types.SimpleNamespace(batch_decode=lambda ids: ids[:, 0].tolist())
    z = lm.get_output_embeddings().weight @ (sae.W_dec[3] * gain)
    assert promotes(lm, tok, sae, [3], n=5)[0]["promotes"] == z.topk(5).indices.tolist()


def test_latents_can_be_removed_where_the_output_is_a_sum(clean):
    sae = clean[2][14]
    x = torch.randn(5, 576)
    f = sae.encode(x)
    torch.testing.assert_close(f @ decoder(sae) + sae.b_dec, sae.decode(f), rtol=1e-4, atol=1e-4)
    scaled = random_sae(rescale_acts_by_decoder_norm=True)
    f = scaled.encode(torch.randn(5, 32))
    torch.testing.assert_close(
        f @ decoder(scaled) + scaled.b_dec, scaled.decode(f), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(UsageError, match="layer_norm"):
        decoder(random_sae(normalize_activations="layer_norm"))


def test_some_latents_lie_between_the_rates():
    lm, sae = tiny("llama"), random_sae()
    rows = torch.randint(3, 97, (6, 16), generator=torch.Generator().manual_seed(0))
    chosen = some_latents(lm, sae, 1, rows, 4, low=0.02, high=0.3)
    rate = (latents_at(lm, sae, 1, rows)[1] > 0).sum((0, 1)) / (6 * 15)
    assert (
        len(set(chosen)) == 4
        and all(0.02 <= rate[i] <= 0.3 for i in chosen)
        and rate[chosen[0]] <= rate[chosen[-1]]
    )
    with pytest.raises(UsageError, match="latents fire at between"):
        some_latents(lm, sae, 1, rows, 10_000, low=0.02, high=0.3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_output_scores_are_what_one_counts_token_by_token(name):
    "Padding, kept positions and the last token of a row foretell nothing."
    lm, sae = tiny(name), random_sae()
    rows = torch.randint(3, 97, (9, 12), generator=torch.Generator().manual_seed(0))
    rows[2, 7:] = -1
    scores, z = output_scores(lm, sae, 1, rows), head(lm).weight @ decoder(sae).T
    _, f, counts = latents_at(lm, sae, 1, rows)
    after, strengths = [], []
    for row in range(9):
        for i in range(11):
            if counts[row, i] and counts[row, i + 1]:
                after.append(z[rows[row, i + 1]])
                strengths.append(f[row, i])
    after, strengths = torch.stack(after), torch.stack(strengths)
    assert len(after) == 8 * 10 + 5
    own = (strengths * after).sum(0) / strengths.sum(0)
    expected = (own - after.mean(0)) / after.std(0, correction=0)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4, equal_nan=True)


@torch.no_grad()
def test_the_score_of_a_latent_turns_with_its_direction():
    lm, sae = tiny("llama"), random_sae("standard")
    rows = torch.randint(3, 97, (8, 16), generator=torch.Generator().manual_seed(1))
    _, f, counts = latents_at(lm, sae, 1, rows)
    before = counts[:, :-1] & counts[:, 1:]
    W, next_tokens = head(lm).weight, rows[:, 1:][before]
    strength = f[:, :-1][before][:, 3]
    said = (strength[:, None] * W[next_tokens]).sum(0) / strength.sum()
    sae.W_dec[3] = said - W[next_tokens].mean(0)
    scores = output_scores(lm, sae, 1, rows)
    sae.W_dec[3] *= -5
    assert scores[3] > 0
    torch.testing.assert_close(output_scores(lm, sae, 1, rows)[3], -scores[3])


@torch.no_grad()
def test_persistence_counts_the_firings_seen_from_a_firing():
    lm, sae = tiny("llama"), random_sae()
    rows = torch.randint(3, 97, (9, 16), generator=torch.Generator().manual_seed(0))
    fired = (latents_at(lm, sae, 1, rows)[1] > 0).sum(1)
    lasting = persistence(lm, sae, 1, rows)
    for latent in range(sae.cfg.d_sae):
        seen = [int(c) for c in fired[:, latent] for _ in range(int(c))]
        expected = sum(seen) / len(seen) if seen else float("nan")
        assert lasting[latent] == pytest.approx(expected, nan_ok=True)
