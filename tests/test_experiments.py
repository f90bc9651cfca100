"""Every experiment runs at size smoke, and what experiments share is right.

Adapters come off again and are recalled exactly; data are where they are said to be.
"""

import pytest
import torch
from conftest import tiny

from sae_lora.experiments import benchmarks, cacheable, saes_at, with_adapters
from sae_lora.files import UsageError, cache_path
from sae_lora.lora import lora_parameters
from sae_lora.notebooks import experiments, run_experiment

RUN = dict(rank=2, layers="after", tokens=64, recipe="fast", seed=0)


def weights(lm) -> torch.Tensor:
    "All weights of the adapter that is on."
    return torch.cat([p.detach().flatten() for p in lora_parameters(lm).values()])


def test_an_adapter_is_recalled_as_it_was(setting):
    lm, saes, rows = setting
    with with_adapters(lm, saes, rows, RUN) as first:
        trained = weights(lm)
    (kept,) = cache_path("adapters").glob("*")
    before = kept.stat().st_mtime_ns
    with with_adapters(lm, saes, rows, RUN) as again:
        assert torch.equal(weights(lm), trained) and again == first
    assert kept.stat().st_mtime_ns == before and not getattr(lm, "peft_config", None)


CHANGES = [dict(rank=3), dict(seed=1), dict(lr=2e-3), dict(tokens=32), dict(batch=1)]


@pytest.mark.parametrize("change", CHANGES)
def test_another_run_is_another_adapter(setting, change):
    lm, saes, rows = setting
    for p in (RUN, RUN | change):
        with with_adapters(lm, saes, rows, p):
            pass
    assert len(list(cache_path("adapters").glob("*"))) == 2


def test_several_are_trained_side_by_side_and_come_off_on_error_too(setting):
    lm, saes, rows = setting
    with pytest.raises(RuntimeError):
        with with_adapters(lm, saes, rows, RUN, RUN | dict(rank=4)) as curves:
            assert list(curves) == ["run0", "run1"] == list(lm.peft_config)
            raise RuntimeError
    assert not getattr(lm, "peft_config", None)
    assert not cache_path("adapters").exists()  # those that were trained together are not kept


def test_learning_rates_side_by_side_are_those_of_each_alone(setting):
    lm, saes, rows = setting
    runs, alone = [RUN | dict(lr=lr) for lr in (4e-3, 1e-3)], []
    for p in runs:
        with with_adapters(lm, saes, rows, p):
            alone.append(weights(lm))
    with with_adapters(lm, saes, rows, *runs) as curves:
        for name, expected in zip(curves, alone):
            own = lora_parameters(lm, name).values()
            found = torch.cat([p.detach().flatten() for p in own])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(*alone)


def test_what_is_kept_is_checked(setting):
    lm, saes, rows = setting
    with with_adapters(lm, saes, rows, RUN):
        pass
    (kept,) = cache_path("adapters").glob("*")
    kept.write_bytes(kept.read_bytes()[:-10])
    with pytest.raises(UsageError, match="it is made again"):
        with with_adapters(lm, saes, rows, RUN):
            pass
    assert not getattr(lm, "peft_config", None)


def test_short_runs_of_the_fast_recipe_are_cacheable():
    lm = tiny("llama")
    assert cacheable(lm, 2**20) and not cacheable(lm, 2**21)
    assert not cacheable(lm, 64, "published")


def test_saes_are_by_layer(world):
    lm, _, saes, blocks = world
    for spec in ("default", ["default"]):
        assert list(saes_at(lm, blocks, spec)) == list(saes)


def test_benchmarks_lie_where_the_user_says(monkeypatch, tmp_path):
    assert (benchmarks("sample") / "blimp").is_dir()
    monkeypatch.setenv("SAE_LORA_DATA", str(tmp_path))
    assert benchmarks("full") == tmp_path
    monkeypatch.delenv("SAE_LORA_DATA")
    with pytest.raises(UsageError, match="SAE_LORA_DATA to a folder"):
        benchmarks("full")
    with pytest.raises(UsageError, match="give full or sample"):
        benchmarks("all")


@pytest.mark.parametrize("name", experiments())
def test_smoke(name):
    "On the real model, with rows of its own."
    pytest.importorskip("papermill")
    import nbformat

    out = run_experiment(name, "smoke")
    nb = nbformat.read(out, 4)
    assert any(
        "image/png" in o.get("data", {})
        for c in nb.cells
        if c.cell_type == "code"
        for o in c.outputs
    )
