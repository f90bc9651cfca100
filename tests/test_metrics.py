"""The shares that are told are what they say, in float32 whatever the model is.

And a wide SAE needs no more room than a narrow one.
"""

import pytest
import torch
from conftest import random_sae, tiny

from sae_lora import sae as sae_module
from sae_lora.files import UsageError
from sae_lora.hidden import hidden
from sae_lora.lm import head
from sae_lora.lora import add_lora, lora_parameters
from sae_lora.metrics import fidelity, sparsity, token_losses
from sae_lora.sae import reconstruct
from sae_lora.splice import check_saes, splice
from sae_lora.text import model_inputs

ROWS = torch.randint(3, 97, (12, 16), generator=torch.Generator().manual_seed(0))


def adapted(name="llama", dtype=torch.float32):
    "A tiny model with an adapter that does something, and its SAEs."
    lm, saes = tiny(name).to(dtype), {1: random_sae()}
    add_lora(lm, saes, rank=2)
    for i, p in enumerate(lora_parameters(lm).values()):
        p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(i))
    return lm, saes


@torch.no_grad()
def test_both_shares_are_those_of_plain_passes():
    lm, saes = adapted()
    report, inputs = fidelity(lm, saes, ROWS), model_inputs(ROWS)

    def log_probabilities(inside, adapter):
        lm.enable_adapters() if adapter else lm.disable_adapters()
        if not inside:
            return lm(**inputs).logits[:, :-1].log_softmax(-1)
        with splice(lm, saes):
            return lm(**inputs).logits[:, :-1].log_softmax(-1)

    base, spliced, student = (
        log_probabilities(*way) for way in ((False, False), (True, False), (True, True))
    )
    lm.enable_adapters()
    kl = [float((base.exp() * (base - q)).sum(-1).mean()) for q in (spliced, student)]
    ce = [float(-q.gather(-1, ROWS[:, 1:, None]).mean()) for q in (base, spliced, student)]
    assert report["kl_closed"] == pytest.approx(1 - kl[1] / kl[0], rel=1e-3)
    assert report["gap_closed"] == pytest.approx((ce[1] - ce[2]) / (ce[1] - ce[0]), rel=1e-3)
    low, high = report["ci95"]["kl_closed"]
    assert low < report["kl_closed"] < high


def test_an_error_leaves_the_mode_as_it_was():
    lm = tiny("llama").train()
    with pytest.raises(UsageError, match="keep 'all'"):
        token_losses(lm, {1: random_sae()}, ROWS, keep="all")
    assert lm.training


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_a_single_vector_is_reconstructed(architecture):
    x, sae = torch.randn(3, 32), random_sae(architecture)
    torch.testing.assert_close(reconstruct(sae, x[1]), reconstruct(sae, x)[1])


def test_without_an_adapter_no_share_is_told():
    report = fidelity(tiny("llama"), {1: random_sae()}, ROWS)
    assert "kl_closed" not in report and set(report["ci95"]) == {"gap"}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@torch.no_grad()
def test_losses_of_a_bfloat16_model_come_from_float32_logits(name):
    lm, saes = adapted(name, torch.bfloat16)
    got = token_losses(lm, saes, ROWS)["ce"]["adapted_unspliced"]
    h = hidden(lm, model_inputs(ROWS), "final").float()
    logits = head(lm).float()(h)[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ROWS[:, 1:].flatten(), reduction="none"
    )
    torch.testing.assert_close(got.flatten(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_a_wide_sae_goes_in_pieces(architecture, monkeypatch):
    lm, sae = tiny("llama"), random_sae(architecture)
    x = torch.randn(2, 24, 32, requires_grad=True)
    whole, measured = reconstruct(sae, x), sparsity(lm, sae, 1, ROWS)
    (gradient,) = torch.autograd.grad(whole.square().sum(), x)
    most = []
    encode = sae.encode
    monkeypatch.setattr(sae, "encode", lambda x: (most.append(x.numel() // 32), encode(x))[1])
    monkeypatch.setattr(sae_module, "PIECE", 5 * sae.cfg.d_sae)
    parts = reconstruct(sae, x)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(parts.square().sum(), x)[0], gradient, rtol=1e-4, atol=1e-5
    )
    assert sparsity(lm, sae, 1, ROWS) == pytest.approx(measured, rel=1e-5)
    assert most and max(most) <= 5  # positions whose latents exist at a time


def test_an_sae_goes_to_its_layers_device_in_place():
    lm, sae = tiny("llama"), random_sae()
    lm.to("meta")  # a device without numbers, which every build of torch has
    assert check_saes(lm, {1: sae})[1] is sae and sae.W_dec.device.type == "meta"
