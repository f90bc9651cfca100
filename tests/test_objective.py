"""What a term of the objective asks for is what the trained model does."""

import pytest
import torch
from conftest import random_sae, tiny
from worlds import ROWS, RUN

from sae_lora.files import UsageError
from sae_lora.lm import head
from sae_lora.lora import add_lora, lora_parameters, without_lora
from sae_lora.metrics import fidelity
from sae_lora.objective import Objective, distill_each
from sae_lora.train import fit_lora


def test_the_unspliced_model_is_kept_where_asked():
    lm, saes = tiny("llama"), {1: random_sae()}
    left = {}
    for strength in (0.0, 3.0):
        add_lora(lm, saes, rank=4)
        fit_lora(lm, saes, ROWS, **RUN | dict(tokens=64 * 16, lr=1e-2), keep_unspliced=strength)
        left[strength] = fidelity(lm, saes, ROWS)["kl"]
        lm.delete_adapter("default")
    assert (
        left[3.0]["adapted_unspliced"] < 0.5 * left[0.0]["adapted_unspliced"]
        and left[3.0]["adapted"] < left[3.0]["spliced"]
    )
    add_lora(lm, saes, rank=4)
    with pytest.raises(UsageError, match="no keep_unspliced"):
        fit_lora(lm, saes, ROWS, 64, "published", keep_unspliced=1.0)


def test_the_penalty_is_the_divergence_it_names():
    lm, saes = tiny("gemma2"), {1: random_sae()}
    batch = {"input_ids": ROWS[:2]}
    add_lora(lm, saes, rank=4)
    for p in lora_parameters(lm).values():
        p.data.normal_(0, 0.1)
    W = head(lm)
    plain, kept = (
        next(distill_each(lm, {None: saes}, Objective(W, keep_unspliced=s), batch)).item()
        for s in (0.0, 0.5)
    )
    with torch.no_grad():
        unspliced = lm(**batch).logits.log_softmax(-1)
        with without_lora(lm):
            base = lm(**batch).logits.log_softmax(-1)
    assert kept - plain == pytest.approx(
        0.5 * float((base.exp() * (base - unspliced)).sum(-1).mean()), rel=1e-3
    )
