"""Fused kernels and plain attention train the adapter that the default way trains."""

import pytest
import torch
from conftest import random_sae, tiny
from worlds import ROWS, RUN

from sae_lora.arithmetic import attention, can_compile, compiled
from sae_lora.lora import add_lora
from sae_lora.train import fit_lora


@pytest.mark.skipif(
    not can_compile(), reason="torch.compile does not work here: it needs a C++ compiler"
)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_fused_kernels_train_the_same_adapter(architecture):
    lm, saes = tiny(architecture), {1: random_sae()}
    ends = []
    for fuse in (False, True):
        add_lora(lm, saes, rank=2)
        curve = fit_lora(lm, saes, ROWS, fuse=fuse, **RUN)
        ends.append([row["loss"] for row in curve])
        lm.delete_adapter("default")
        assert all("forward" not in m.__dict__ for m in lm.modules())
    torch.testing.assert_close(torch.tensor(ends[0]), torch.tensor(ends[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_plain_attention_trains_the_same_adapter(architecture, monkeypatch):
    lm, saes = tiny(architecture), {1: random_sae()}
    ends, rows = [], ROWS.clone()
    rows[::3, 9:] = -1  # padding goes into the mask, which the two build differently
    for pays in (False, True):
        monkeypatch.setattr("sae_lora.arithmetic.SHORT", ROWS.shape[1] if pays else 0)
        seen = []
        add_lora(lm, saes, rank=2)
        curve = fit_lora(
            lm,
            saes,
            rows,
            **RUN | dict(precision="bf16"),
            callback=lambda row: seen.append(lm.config._attn_implementation),
        )
        ends.append([row["loss"] for row in curve])
        lm.delete_adapter("default")
        assert (
            set(seen) == {"eager" if pays else "sdpa"} and lm.config._attn_implementation == "sdpa"
        )
    torch.testing.assert_close(torch.tensor(ends[0]), torch.tensor(ends[1]), rtol=2e-2, atol=1e-3)


def test_an_error_leaves_the_blocks_as_they_were():
    lm = tiny("llama")
    with pytest.raises(ZeroDivisionError):
        with compiled(lm), attention(lm, "eager"):
            1 / 0
    assert (
        all("forward" not in m.__dict__ for m in lm.modules())
        and lm.config._attn_implementation == "sdpa"
    )
