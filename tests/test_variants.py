"""What is trained beside the adapter."""

import pytest
from conftest import random_sae, tiny
from worlds import ROWS, trained

from sae_lora.files import UsageError
from sae_lora.lora import add_lora
from sae_lora.variants import finetune_sae, fit_both


def test_adapter_and_sae_train_together_at_their_own_rates():
    lm, saes = tiny("llama"), {1: random_sae()}
    add_lora(lm, saes, rank=4)
    adapter, sae = trained(lm), {n: p.clone() for n, p in saes[1].named_parameters()}
    rate = 1e-3
    fit_both(
        lm, saes, ROWS, tokens=16, batch=1, lr=rate, warmup=0.0, precision="fp32"
    )  # one step of Adam moves what has a gradient by about the rate

    def moved(now, was):
        return max(float((p - was[n]).abs().max()) for n, p in now.items())

    assert moved(trained(lm), adapter) == pytest.approx(rate, rel=0.05) and moved(
        dict(saes[1].named_parameters()), sae
    ) == pytest.approx(rate / 10, rel=0.05)
    assert not any(p.requires_grad for p in saes[1].parameters())


def test_muon_is_for_matrices_alone():
    lm, saes = tiny("llama"), {1: random_sae()}
    with pytest.raises(UsageError, match="b_dec is none; take adamw"):
        finetune_sae(lm, saes, ROWS, tokens=16, batch=1, parameters=["b_dec"], optimizer="muon")
    with pytest.raises(UsageError, match="optimizer 'sgd'.*adamw, muon"):
        finetune_sae(lm, saes, ROWS, tokens=16, batch=1, optimizer="sgd")
