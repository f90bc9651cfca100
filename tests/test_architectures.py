"""What is promised for one architecture holds for all.

Hidden states, going on from a layer, head, splice, adapter, generation.
"""

import pytest
import torch
from conftest import CONFIGS, random_sae, tiny
from worlds import FAMILIES

from sae_lora.adapters import save_adapter
from sae_lora.hidden import hidden, resume
from sae_lora.lm import decoder_blocks, head, linears
from sae_lora.lora import add_lora, lora_layers, lora_parameters, without_lora
from sae_lora.models import four_models
from sae_lora.objective import Objective, distill, published_each
from sae_lora.splice import Identity, splice

IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS}


@torch.no_grad()
def test_hidden_states_are_those_of_transformers(any_lm):
    out = any_lm(**BATCH, output_hidden_states=True)
    assert len(decoder_blocks(any_lm)) == 4
    for i in (-1, 0, 1, 2):
        torch.testing.assert_close(
            hidden(any_lm, BATCH, i), out.hidden_states[i + 1], rtol=0, atol=0
        )
    torch.testing.assert_close(
        head(any_lm)(hidden(any_lm, BATCH, "final")), out.logits, rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_going_on_from_a_layer_is_the_full_pass(any_lm):
    full, h = any_lm(**BATCH).logits, hidden(any_lm, BATCH, 1)
    with resume(any_lm, 1, h):
        assert torch.equal(any_lm(**BATCH).logits, full)
    with resume(any_lm, 1, h * 0.5):
        assert not torch.allclose(any_lm(**BATCH).logits, full)
    assert torch.equal(any_lm(**BATCH).logits, full)


@torch.no_grad()
def test_identity_sae_and_untrained_adapter_change_no_bit(any_lm):
    full = any_lm(**BATCH).logits
    add_lora(any_lm, {1: Identity(32)}, rank=2)
    assert lora_layers(any_lm) == [2, 3] and len(lora_parameters(any_lm)) == 4 * len(
        linears(any_lm, 2)
    )
    for layer in (-1, 1):
        with splice(any_lm, {layer: Identity(32)}):
            assert torch.equal(any_lm(**BATCH).logits, full)


@torch.no_grad()
def test_splice_replaces_all_but_the_kept_positions(any_lm):
    sae, seen = random_sae(), []
    handle = decoder_blocks(any_lm)[1].register_forward_hook(
        lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    h = hidden(any_lm, BATCH, 1)
    seen.clear()
    with splice(any_lm, {1: sae}) as state:
        any_lm(**BATCH)
    handle.remove()
    assert state.fired == {1: 1} and torch.equal(
        seen[0][:, 0], h[:, 0]
    )  # the sink is kept, and a hook that was there before sees the splice
    torch.testing.assert_close(seen[0][:, 1:], sae(h)[:, 1:], rtol=1e-4, atol=1e-4)
    with splice(any_lm, {1: sae}, keep="none"):
        assert not torch.allclose(hidden(any_lm, BATCH, 2), h)


@torch.no_grad()
def test_generation_with_a_cache_is_generation_without(any_lm):
    with splice(any_lm, {1: random_sae()}):
        options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
        with_cache = any_lm.generate(IDS, **options, use_cache=True)
        assert torch.equal(with_cache, any_lm.generate(IDS, **options, use_cache=False))


def test_shared_prefix_is_the_full_pass(any_lm):
    saes = {1: random_sae()}
    add_lora(any_lm, saes, rank=2)
    with torch.no_grad():
        for p in lora_parameters(any_lm).values():
            p.normal_(0, 0.1)
        four = four_models(any_lm, saes, BATCH)
        with splice(any_lm, saes):
            torch.testing.assert_close(
                four["adapted"], hidden(any_lm, BATCH, "final"), rtol=0, atol=0
            )
        with without_lora(any_lm):
            torch.testing.assert_close(four["base"], hidden(any_lm, BATCH, "final"), rtol=0, atol=0)
        torch.testing.assert_close(
            four["adapted_unspliced"], hidden(any_lm, BATCH, "final"), rtol=0, atol=0
        )


def test_loss_and_gradient_are_those_of_the_published_loop(any_lm):
    saes = {1: random_sae()}
    add_lora(any_lm, saes, rank=2)
    params = list(lora_parameters(any_lm).values())
    with torch.no_grad():
        for p in params:
            p.normal_(0, 0.1)
    W = head(any_lm)
    ours = distill(any_lm, saes, W, BATCH, keep="none")
    objective = Objective(W, keep="none")
    (theirs,) = published_each(any_lm, {None: saes}, objective, BATCH)
    torch.testing.assert_close(ours * IDS.shape[1], theirs, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(ours, params), torch.autograd.grad(theirs, params)):
        torch.testing.assert_close(a * IDS.shape[1], b, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt"])
@torch.no_grad()
def test_padding_changes_nothing_for_the_others(name):
    lm, sae = tiny(name), random_sae()
    short = IDS[:1, :7]
    with splice(lm, {1: sae}):
        alone = lm(input_ids=short).logits
        for left in (True, False):
            pad = torch.zeros(1, 5, dtype=torch.long)
            ids, mask = (
                torch.cat((pad, x) if left else (x, pad), 1)
                for x in (short, torch.ones_like(short))
            )
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            padded = lm(
                input_ids=ids,
                attention_mask=mask,
                position_ids=None if name == "opt" else positions,
            ).logits
            torch.testing.assert_close(
                padded[:, 5:] if left else padded[:, :7], alone, rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@torch.no_grad()
def test_documents_kept_apart_do_not_see_each_other(name):
    from sae_lora.text import model_inputs

    lm, sae = tiny(name), random_sae()
    rows = torch.stack([IDS, torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]).expand_as(IDS)], 1)
    with splice(lm, {1: sae}):
        together = lm(**model_inputs(rows)).logits
        torch.testing.assert_close(
            together[:, 5:], lm(input_ids=IDS[:, 5:]).logits, rtol=1e-4, atol=1e-4
        )


def test_every_architecture_is_listed():
    assert {"gemma", *FAMILIES} <= set(CONFIGS)


@torch.no_grad()
def test_a_peft_model_is_a_model(tmp_path):
    from peft import LoraConfig, get_peft_model

    lm = tiny("llama")
    full = lm(**BATCH).logits
    wrapped = get_peft_model(lm, LoraConfig(r=2, target_modules=linears(lm, 2)))
    for p in lora_parameters(wrapped).values():
        p.normal_(0, 0.1)
    assert lora_layers(wrapped) == [2] and len(decoder_blocks(wrapped)) == 4
    with without_lora(wrapped), splice(wrapped, {1: Identity(32)}):
        assert torch.equal(wrapped(**BATCH).logits, full)
    assert not torch.equal(wrapped(**BATCH).logits, full)
    save_adapter(wrapped, {1: random_sae()}, tmp_path / "adapter")
    assert "Rank 2," in (tmp_path / "adapter" / "README.md").read_text()
