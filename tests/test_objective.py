"""What a term of the objective asks for is what the trained model does."""

import pytest
import torch
from conftest import random_sae, tiny
from worlds import ROWS, RUN

from sae_lora.files import UsageError
from sae_lora.lm import head
from sae_lora.lora import add_lora, lora_parameters, only, without_lora
from sae_lora.metrics import fidelity
from sae_lora.objective import Objective, distill_each, published_each
from sae_lora.splice import splice
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


def as_it_was(lm, saes, batch, keep):
    "The published loss with a teacher of its own."
    batch = batch | {"use_cache": False}
    with torch.no_grad(), without_lora(lm):
        teacher = lm(**batch).logits.float().softmax(-1)
    with splice(lm, saes, keep):
        student = lm(**batch).logits.float().log_softmax(-1)
    return torch.nn.functional.kl_div(student, teacher, reduction="batchmean")


def test_published_students_share_one_teacher_and_lose_no_bit():
    lm, saes = tiny("gemma2"), {1: random_sae()}
    batch = {"input_ids": ROWS[:1]}
    names = ["default", "r2", "r4"]
    for rank, name in zip((1, 2, 4), names):
        add_lora(lm, saes, rank=rank, name=name, alpha=32, lora_dropout=0.1)
        for p in lora_parameters(lm, name).values():
            p.data.normal_(0, 0.1)
    for name, module in lm.named_modules():
        module.train(name.endswith("lora_dropout"))
    torch.manual_seed(0)
    alone = []
    for name in names:
        with only(lm, name):
            alone.append(as_it_was(lm, saes, batch, "none").item())
    torch.manual_seed(0)
    passes = []
    counted = lm.model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    students = {name: saes for name in names}
    each = published_each(lm, students, Objective(None, keep="none"), batch)
    assert [loss.item() for loss in each] == alone
    counted.remove()
    assert passes == [False, True, True, True]
    assert len(set(alone)) == 3
