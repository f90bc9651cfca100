"""The check before a run: what it finds, that it leaves no trace, what it says of budgets."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import random_sae, tiny
from worlds import AFTER_EOS, BOS, EOS, GOOD, TWO, tokenizer

from sae_lora import check
from sae_lora.files import UsageError
from sae_lora.lora import add_lora, lora_parameters
from sae_lora.metrics import fidelity
from sae_lora.recipes import RECIPES
from sae_lora.train import fit_lora


def trained(lm, saes, recipe: str) -> list[torch.Tensor]:
    "The weights of an adapter after a few steps."
    add_lora(lm, saes, rank=2, seed=3, **RECIPES[recipe].adapter)
    fit_lora(lm, saes, AFTER_EOS, 16 * 8, recipe, seed=3)
    return [p.detach().clone() for p in lora_parameters(lm).values()]


@pytest.mark.parametrize("recipe", ["fast", "published"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_a_check_leaves_no_trace(architecture, recipe):
    saes = {1: random_sae()}
    plain, checked = tiny(architecture), tiny(architecture)
    before = [(n, type(m), m.training) for n, m in checked.named_modules()]
    state, flags = (
        torch.get_rng_state(),
        [(n, p.requires_grad) for n, p in checked.named_parameters()],
    )
    check.preflight(
        checked,
        tokenizer(),
        saes,
        AFTER_EOS,
        dict(rank=3, layers="all", **RECIPES[recipe].adapter),
        dict(recipe=recipe),
        steps=3,
    )
    assert [(n, type(m), m.training) for n, m in checked.named_modules()] == before
    assert (
        torch.equal(torch.get_rng_state(), state)
        and [(n, p.requires_grad) for n, p in checked.named_parameters()] == flags
    )
    for a, b in zip(trained(plain, saes, recipe), trained(checked, saes, recipe)):
        assert torch.equal(a, b)


def test_a_model_with_an_adapter_is_left_alone():
    lm, saes = tiny("llama"), {1: random_sae()}
    add_lora(lm, saes, rank=2)
    with pytest.raises(UsageError, match="delete_adapter"):
        check.preflight(lm, tokenizer(), saes, AFTER_EOS)
    assert lora_parameters(lm)


def test_one_step_tells_no_time():
    with pytest.raises(UsageError, match="steps 1; give a number from 2"):
        check.preflight(tiny("llama"), tokenizer(), {1: random_sae()}, AFTER_EOS, steps=1)


def test_an_error_in_the_trial_takes_the_adapter_off():
    lm, saes = tiny("llama"), {1: random_sae()}
    names = [n for n, _ in lm.named_modules()]
    with pytest.raises(UsageError, match="slow"):
        check.preflight(lm, tokenizer(), saes, AFTER_EOS, dict(rank=2), dict(recipe="slow"))
    with pytest.raises(UsageError, match="rank 0"):
        check.preflight(lm, tokenizer(), saes, AFTER_EOS, dict(rank=0))
    assert [n for n, _ in lm.named_modules()] == names


def test_it_measures_what_fidelity_measures():
    lm, saes = (
        tiny("llama"),
        {1: random_sae(), 2: random_sae("jumprelu", hook_name="blocks.2.hook_resid_post")},
    )
    found, direct = (
        check.preflight(lm, tokenizer(), saes, AFTER_EOS, dict(rank=2)),
        fidelity(lm, saes, AFTER_EOS),
    )
    assert found["ce"] == pytest.approx(direct["ce"]["base"], abs=1e-6) and found[
        "gap"
    ] == pytest.approx(direct["gap"], abs=1e-6)
    assert found["ci95"]["gap"] == pytest.approx(direct["ci95"]["gap"], abs=1e-6) and found[
        "perplexity"
    ] == pytest.approx(math.exp(found["ce"]))
    assert (
        [s["layer"] for s in found["saes"]] == [1, 2]
        and found["saes"][0]["promised_l0"] == 8
        and found["saes"][1]["promised_l0"] is None
    )
    assert (
        found["step_tokens"] == 32
        and found["step_seconds"] > 0
        and found["device"] == "cpu"
        and found["dtype"] == "float32"
    )
    json.dumps(found)


@pytest.mark.parametrize(
    "template, endoftext, ways",
    [
        (None, False, [[EOS], [BOS]]),
        ("<bos> $A", False, [[BOS], [EOS]]),
        ("<bos> <two> $A", False, [[BOS, TWO], [BOS], [EOS]]),
        ("<eos> $A", False, [[EOS], [BOS]]),
        (None, True, [[EOS], [BOS]]),
    ],
)
def test_beginnings_as_rows_have_it_first_and_none_twice(template, endoftext, ways):
    assert list(check.beginnings(tokenizer(template, endoftext)).values()) == ways


def test_no_bos_token():
    tok = tokenizer()
    tok.bos_token = None
    assert list(check.beginnings(tok).values()) == [[EOS]]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere"])
def test_losses_after_each_beginning_are_the_models_own(architecture):
    lm = tiny(architecture)
    for name, loss in check.beginning_losses(lm, tokenizer(), AFTER_EOS).items():
        rows = torch.cat(
            [torch.full((6, 1), dict(zip(("<eos>", "<bos>"), (EOS, BOS)))[name]), AFTER_EOS[:, 1:]],
            1,
        )
        log = (
            lm(rows).logits[:, 1:-1].float().log_softmax(-1)
        )  # the first token of the text is not counted
        assert loss == pytest.approx(float(-log.gather(-1, rows[:, 2:, None]).mean()), abs=1e-5)


def test_promised_l0():
    def sae(k=None, **metadata):
        return SimpleNamespace(cfg=SimpleNamespace(metadata=metadata, **({"k": k} if k else {})))

    assert check.promised_l0(random_sae()) == 8
    assert check.promised_l0(random_sae("jumprelu")) is None
    assert check.promised_l0(sae(source="gemma/layer_12/width_16k/average_l0_82/params.npz")) == 82
    assert (
        check.promised_l0(sae(source="gemma-scope-2b-pt-res-canonical:layer_1/width_16k/canonical"))
        == 102
    )
    assert check.promised_l0(sae(source="no-such-release:layer_1")) is None
    assert (
        check.promised_l0(sae(l0=61.5)) == 61.5
        and check.promised_l0(sae(training_architecture_details=dict(k=20))) == 20
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(perplexity=900.0), ["predicts this text badly (perplexity 900)"]),
        (
            dict(beginnings={"<eos>": 4.1, "<bos>": 3.0}),
            ["begin with <eos>", "after <bos>", "1.10 nats better"],
        ),
        (dict(ci95=dict(gap=[-0.01, 0.2])), ["within its interval of zero", "1,000 tokens"]),
        (dict(gap=-0.1, ci95=dict(gap=[-0.2, -0.05])), ["not above zero"]),
        (
            dict(saes=[dict(layer=3, l0=412.0, promised_l0=82.0, fvu=0.2)]),
            ["L0 of the SAE at layer 3 is 412 where 82 was promised"],
        ),
        (
            dict(saes=[dict(layer=3, l0=412.0, promised_l0=None, fvu=0.6)]),
            ["leaves 60 % of the variance unexplained"],
        ),
        (
            dict(memory_bytes=31e9, device_memory_bytes=24e9),
            ["needs about 31 GB and the device has 24"],
        ),
    ],
)
def test_warnings(change, words):
    assert check.warnings_of(GOOD) == []
    (said,) = check.warnings_of(GOOD | change)
    assert all(w in said for w in words) and "\n" not in said, said
    if "memory_bytes" not in change:
        assert f"warning    {said}" in check.summary(GOOD | check.expected(GOOD, 51_200) | change)


def test_a_budget_in_time_memory_and_tokens():
    plain, fused = (
        check.expected(GOOD, 51_300, 1000),
        check.expected(GOOD, 51_300, 1000, fused=True),
    )
    assert (
        plain["train_tokens"] == 51_200
        and plain["train_seconds"] == 200
        and plain["evaluate_seconds"] == 10
    )
    assert (
        fused["train_seconds"] == 200 * check.FUSED + check.MAKING
        and plain["memory_bytes"] == 2 * 10**9 + 100 + 16 * 51_300
    )
    assert (
        check.expected(GOOD | dict(device="cuda"), 51_300)["memory_bytes"] == 2 * 10**9
        if torch.cuda.is_available()
        else True
    )
    assert (
        check.tokens_in(GOOD, 180) == 90 * 512
        and check.tokens_in(GOOD, 1) == 2**13
        and check.tokens_in(GOOD | dict(step_tokens=3000), 1) == 9000
    )


@pytest.mark.parametrize(
    "seconds, words",
    [(40, "40 seconds"), (180, "3 minutes"), (754, "13 minutes"), (3 * 3600, "3 hours")],
)
def test_times_are_told_plainly(seconds, words):
    assert check.duration(seconds) == words
