"""A variant of the recipe changes the one setting it names, and comes off again."""

import pytest
import torch
from conftest import random_sae, tiny

from sae_lora.lora import lora_parameters
from sae_lora.recipe_study import changed

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
    [dict(batch=1), dict(lr=2e-3), dict(decay="constant"), dict(alpha=4), dict(times_b=4.0)],
)
def test_a_setting_is_changed(changes):
    assert not same(adapter(), adapter(**changes))


def test_nothing_changed_is_the_recipe():
    assert same(adapter(), adapter(times_b=1.0)) and same(adapter(), adapter(alpha=2))


def test_where_the_adapter_is():
    assert all("mlp" in n for n in adapter(roles=["mlp"]))
    assert {n.split(".layers.")[1][0] for n in adapter(layers="all")} == set("0123")


def test_an_adapter_comes_off_on_error_too():
    lm = tiny("llama")
    with pytest.raises(RuntimeError):
        with changed(lm, {1: random_sae()}, ROWS, RUN | dict(changes={})):
            raise RuntimeError
    assert not getattr(lm, "peft_config", None)
