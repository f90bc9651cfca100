"""An adapter begins where data say, and as the model itself."""

import pytest
import torch
from conftest import random_sae, tiny
from worlds import BOS, EOS, ROWS

from sae_lora.files import UsageError
from sae_lora.hidden import hidden
from sae_lora.lm import head, linears
from sae_lora.lora import add_lora, lora_parameters
from sae_lora.objective import distill
from sae_lora.sites import Site
from sae_lora.splice import splice
from sae_lora.starts import STARTS, start_at
from sae_lora.text import model_inputs


def begun(architecture: str, start: str, rows: torch.Tensor = ROWS):
    "A tiny model with an adapter of rank 3, begun; its SAEs."
    lm, saes = tiny(architecture), {1: random_sae()}
    add_lora(lm, saes, rank=3)
    start_at(lm, saes, rows, start)
    return lm, saes


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("start", STARTS)
def test_it_begins_as_the_model_itself_with_orthogonal_rows_of_the_same_length(architecture, start):
    lm, saes = begun(architecture, start)
    drawn = tiny(architecture)
    batch = model_inputs(ROWS)
    assert torch.equal(lm(**batch).logits, drawn(**batch).logits)
    add_lora(drawn, saes, rank=3)
    before = lora_parameters(drawn)
    for name, p in lora_parameters(lm).items():
        if "lora_A" in name:
            assert torch.isclose(p.norm(), before[name].norm(), rtol=1e-5)
            assert torch.allclose(p @ p.T, torch.eye(3) * p.norm() ** 2 / 3, atol=1e-4)
        assert p.grad is None and p.requires_grad


def leading(M: torch.Tensor) -> torch.Tensor:
    "Projection onto the three leading right singular vectors of M."
    rows = torch.linalg.svd(M, full_matrices=False).Vh[:3]
    return rows.T @ rows


def spanned(lm, name: str) -> torch.Tensor:
    "Projection onto the rows of A of a linear."
    A = lora_parameters(lm)[f"{name}.lora_A.default.weight"].detach()
    rows = A / A.norm(dim=1, keepdim=True)
    return rows.T @ rows


@pytest.mark.parametrize("special", [None, BOS, EOS])
def test_inputs_and_error_are_those_of_the_linear_where_the_splice_replaces(special):
    rows = ROWS.clone()
    replaced = torch.ones_like(rows, dtype=torch.bool)
    replaced[:, 0] = False
    if special is not None:  # a row that begins with a BOS; documents parted in the middle of one
        at = 0 if special == BOS else 7
        rows[:, at], replaced[:, at] = special, False
    batch, site = model_inputs(rows), Site(2, "mlp.hook_in")
    for start in ("inputs", "error"):
        lm, saes = begun("llama", start, rows)
        (name,) = [n for n in linears(lm, 2, ["mlp"]) if "up_proj" in n]
        with splice(lm, saes):
            x = hidden(lm, batch, site)
        x = x - hidden(lm, batch, site) if start == "error" else x
        expected = leading(x.detach()[replaced])
        torch.testing.assert_close(spanned(lm, name), expected, atol=1e-3, rtol=0)


def test_the_gradient_is_that_of_the_weight():
    lm, saes = begun("llama", "gradient")
    (name,) = [n for n in linears(lm, 3, ["mlp"]) if "down_proj" in n]
    weight = lm.get_submodule(name).base_layer.weight
    weight.requires_grad_(True)
    distill(lm, saes, head(lm), model_inputs(ROWS)).backward()
    torch.testing.assert_close(spanned(lm, name), leading(weight.grad), atol=1e-3, rtol=0)


def test_a_rank_beyond_the_directions_that_there_are():
    lm, saes = tiny("llama"), {1: random_sae()}
    add_lora(lm, saes, rank=200)
    before = {n: p.detach().clone() for n, p in lora_parameters(lm).items()}
    start_at(lm, saes, ROWS, "inputs")
    for name, p in lora_parameters(lm).items():
        if "lora_A" in name:
            n = p.shape[1]
            assert not torch.equal(p[:n], before[name][:n])
            assert torch.equal(p[n:], before[name][n:]) and n < 200


@pytest.mark.parametrize("start", STARTS)
def test_padding_counts_for_nothing(start):
    short = ROWS[:4].clone()
    padded = torch.cat([short, torch.full((4, 5), -1)], 1)
    found = []
    for rows in (short, padded):
        lm, saes = tiny("llama"), {1: random_sae()}
        add_lora(lm, saes, rank=3)
        start_at(lm, saes, rows, start)
        found.append(spanned(lm, linears(lm, 3, ["mlp"])[0]))
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)


def test_another_start_is_refused():
    lm, saes = tiny("llama"), {1: random_sae()}
    add_lora(lm, saes, rank=2)
    with pytest.raises(UsageError, match="inputs, error, gradient"):
        start_at(lm, saes, ROWS, "kaiming")
