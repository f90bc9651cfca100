"""Each way trains what it says and nothing else, and leaves model and SAE as they were."""

import pytest
import torch

from sae_lora.ways import WAYS, by_way, layers_of_way, losses_of, same_latents

RUN = dict(rank=2, near=1, tokens=64, seed=0, keep_unspliced=0.0)


@pytest.mark.parametrize("way", WAYS)
def test_a_way_changes_the_loss_and_is_gone_afterwards(setting, way):
    lm, saes, rows = setting
    weights = [p.clone() for p in [*lm.parameters(), *saes[1].parameters()]]
    plain = losses_of(lm, saes, rows)
    with by_way(lm, saes, rows, RUN | dict(way=way)) as (now, curve):
        found = losses_of(lm, now, rows)
        assert bool(getattr(lm, "peft_config", None)) == way.startswith("LoRA")
        assert (now[1] is saes[1]) == (way in WAYS[:3]) and curve[-1]["tokens"] == 64
    assert found["ce"] != plain["ce"] and found["base"] == pytest.approx(plain["base"], rel=1e-5)
    assert (found["kl_unspliced"] > 0) == way.startswith("LoRA")
    assert not getattr(lm, "peft_config", None)
    after = [*lm.parameters(), *saes[1].parameters()]
    assert all(torch.equal(p, before) for p, before in zip(after, weights, strict=True))


def test_an_adapter_comes_off_on_error_too(setting):
    lm, saes, rows = setting
    with pytest.raises(RuntimeError):
        with by_way(lm, saes, rows, RUN | dict(way="LoRA + SAE")):
            raise RuntimeError
    assert not getattr(lm, "peft_config", None)


def test_where_adapters_are():
    assert layers_of_way("LoRA after", 5, near=2) == "after"
    assert layers_of_way("LoRA all", 5, near=2) == "all"
    assert layers_of_way("LoRA near", 5, near=2) == [6, 7]


def test_how_far_active_latents_are_the_same():
    a = torch.tensor([[True, True, False]])
    assert same_latents(a, a) == 1 and same_latents(a, ~a) == 0
    assert same_latents(a, torch.tensor([[False, True, True]])) == pytest.approx(1 / 3)
