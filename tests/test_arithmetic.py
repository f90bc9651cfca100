"""However products are computed, the adapter is the one that the default way trains."""

import pytest
import torch
from conftest import random_sae, tiny
from worlds import ROWS, RUN

from sae_lora import devices
from sae_lora.arithmetic import Arithmetic, attention, can_compile, compiled
from sae_lora.devices import fast_float32, onednn_pays
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


AMD = {"cpu_name": "AMD EPYC", "avx512_f": True}


@pytest.mark.parametrize(
    "has, exact, pays",
    [
        (AMD, True, True),
        (AMD, False, False),  # a processor to come that rounds
        (AMD | {"avx512_f": False}, True, False),
        (AMD | {"cpu_name": "Intel(R) Xeon(R)", "amx_bf16": True}, True, False),
        ({}, True, False),
    ],
)
def test_onednn_multiplies_where_it_is_faster_and_exact(has, exact, pays, monkeypatch):
    onednn_pays.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", lambda: has)
        patch.setattr(devices, "_exact", lambda n: exact)
        patch.setattr(torch.accelerator, "is_available", lambda: False)
        assert onednn_pays() is pays
        for way in (fast_float32, Arithmetic("cpu", bf16=False)):
            with way():
                assert torch.get_float32_matmul_precision() == ("medium" if pays else "highest")
        with Arithmetic("cpu", bf16=False, plain=True)():
            assert torch.get_float32_matmul_precision() == "highest"
    onednn_pays.cache_clear()


def test_no_gpu_is_allowed_to_round(monkeypatch):
    "The allowance holds for all devices, and on a GPU it costs digits."
    onednn_pays.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", lambda: AMD)
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        with fast_float32():
            assert torch.get_float32_matmul_precision() == "highest"
    onednn_pays.cache_clear()


@fast_float32()
def test_products_inside_have_all_digits_of_float32():
    "Forward and backward, at the shapes of a model: bfloat16 would be off by a hundred times that."
    g = torch.Generator().manual_seed(0)
    for n, inner, m in ((7, 576, 1536), (256, 1536, 576), (64, 576, 4096)):
        x = torch.randn(n, inner, generator=g, requires_grad=True)
        w = torch.randn(m, inner, generator=g, requires_grad=True)
        z = torch.nn.functional.linear(x, w)
        z.backward(torch.ones_like(z))
        true = torch.nn.functional.linear(x.double(), w.double())
        assert (z - true).abs().max() < 1e-6 * inner
        torch.testing.assert_close(
            x.grad.double(), w.double().sum(0).expand(n, -1), rtol=1e-5, atol=1e-3
        )


def test_precision_is_put_back_after_a_failure():
    with pytest.raises(ZeroDivisionError), fast_float32():
        1 / 0
    assert torch.get_float32_matmul_precision() == "highest"
