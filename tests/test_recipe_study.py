"""A variant of the recipe changes the one setting it names, and comes off again."""

import pytest
import torch
from conftest import random_sae, tiny

from sae_lora.lora import add_lora, lora_parameters
from sae_lora.metrics import token_losses
from sae_lora.recipe_study import changed, hardest
from sae_lora.train import fit_lora

RUN = dict(rank=2, tokens=64, seed=0)
ROWS = torch.randint(3, 97, (8, 16), generator=torch.Generator().manual_seed(0))


def adapter(**changes) -> dict:
    "The weights of an adapter that was trained with some changes."
    lm = tiny("llama")
    with changed(lm, {1: random_sae()}, ROWS, RUN | dict(changes=changes)):
        found = {n: p.detach().clone() for n, p in lora_parameters(lm).items()}
    assert not getattr(lm, "peft_config", None)
    return found


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(
    "changes",
    [
        dict(batch=1),
        dict(lr=2e-3),
        dict(decay="constant"),
        dict(alpha=4),
        dict(times_a=0.0),
        dict(times_b=4.0),
        dict(optimizer="muon"),
        dict(start="inputs"),
        dict(start="error"),
        dict(start="gradient"),
        dict(hard=True),
        dict(average=0.5),
        dict(beside=True),
    ],
)
def test_a_setting_is_changed(changes):
    assert not same(adapter(), adapter(**changes))


def test_nothing_changed_is_the_recipe():
    assert same(adapter(), adapter(times_b=1.0)) and same(adapter(), adapter(alpha=2))


def test_a_matrix_without_a_rate_stays_as_it_begins():
    lm = tiny("llama")
    add_lora(lm, {1: random_sae()}, rank=2, seed=0)
    began, found = lora_parameters(lm), adapter(times_a=0.0)
    for n, p in found.items():
        assert torch.equal(p, began[n]) == ("lora_A" in n)


def test_what_is_trained_beside_the_adapter_goes_with_it():
    lm, saes = tiny("llama"), {1: random_sae()}
    with changed(lm, saes, ROWS, RUN | dict(changes=dict(beside=True))) as (now, _):
        assert now[1].sae is saes[1] and now[1].B.abs().sum() > 0
    with changed(lm, saes, ROWS, RUN | dict(changes={})) as (now, _):
        assert now is saes


def test_the_mean_is_over_the_share_of_the_run_that_is_asked_for():
    seen = []

    def kept(row):
        seen.append({n: p.detach().clone() for n, p in lora_parameters(lm).items()})

    lm, saes = tiny("llama"), {1: random_sae()}
    add_lora(lm, saes, rank=2, seed=0)
    fit_lora(lm, saes, ROWS, 64, seed=0, batch=1, callback=kept)  # four steps, a point each
    mean = {n: (seen[1][n] + seen[2][n] + seen[3][n]) / 3 for n in seen[0]}
    found = adapter(average=0.5, batch=1)
    assert found.keys() == mean.keys()
    for n, p in found.items():
        torch.testing.assert_close(p, mean[n])


def test_padding_does_not_make_a_row_hard_or_easy():
    lm, saes = tiny("llama"), {1: random_sae()}
    padded = torch.cat([ROWS, torch.full((len(ROWS), 9), -1)], 1)
    assert torch.equal(hardest(lm, saes, padded)[:, :16], hardest(lm, saes, ROWS))


def test_an_adapter_is_averaged_whatever_is_trained_beside_it():
    both = adapter(beside=True, average=0.5)
    assert not same(both, adapter(beside=True)) and not same(both, adapter(average=0.5))


def test_hard_rows_are_those_that_the_splice_costs_most():
    lm, saes = tiny("llama"), {1: random_sae()}
    cost = token_losses(lm, saes, ROWS)["kl"]["spliced"].mean(1)
    least = cost.topk(4).values.min()
    assert torch.equal(hardest(lm, saes, ROWS), ROWS[cost >= least])


def test_where_the_adapter_is():
    assert all("mlp" in n for n in adapter(roles=["mlp"]))
    assert {n.split(".layers.")[1][0] for n in adapter(layers="all")} == set("0123")


def test_an_adapter_comes_off_on_error_too():
    lm = tiny("llama")
    with pytest.raises(RuntimeError):
        with changed(lm, {1: random_sae()}, ROWS, RUN | dict(changes={})):
            raise RuntimeError
    assert not getattr(lm, "peft_config", None)
