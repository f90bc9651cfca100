"""The objective and the loop on tiny models: exact, side by side as alone, fused as plain, several processes as one."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_sae, tiny

from sae_lora.files import UsageError
from sae_lora.lm import Head, head
from sae_lora.loss import attention, can_compile, compiled, kl_loss, losses
from sae_lora.lora import add_lora, lora_parameters, without_lora
from sae_lora.metrics import fidelities, fidelity
from sae_lora.train import distill_each, fit_both, fit_lora, fit_loras

ROWS = torch.randint(3, 97, (24, 16), generator=torch.Generator().manual_seed(0))
RUN = dict(tokens=16 * 16, batch=2, precision="fp32")


@pytest.mark.parametrize("scale, softcap, bias", [(1.0, 0.0, False), (0.25, 0.0, True), (1.0, 5.0, False), (0.7, 3.0, True)])
@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_loss_and_gradient_are_the_naive_ones_in_fp64(scale, softcap, bias, chunk):
    torch.manual_seed(0)
    W = Head(torch.randn(300, 12, dtype=torch.double), torch.randn(300, dtype=torch.double) if bias else None, scale, softcap)
    teacher, student = torch.randn(2, 100, 12, dtype=torch.double)
    x, y = student.clone().requires_grad_(), student.clone().requires_grad_()
    ours, naive = kl_loss(W, x, teacher, chunk), torch.nn.functional.kl_div(W(y).log_softmax(-1), W(teacher).log_softmax(-1), log_target=True, reduction="sum") / 100
    (3 * ours).backward(); (3 * naive).backward()
    torch.testing.assert_close(ours, naive, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-14)


def test_measured_and_trained_loss_are_one():
    torch.manual_seed(0)
    W, (teacher, student), t = Head(torch.randn(300, 12), None, 1.0, 5.0), torch.randn(2, 100, 12), torch.randint(0, 300, (100,))
    torch.testing.assert_close(losses(W, {"base": teacher, "student": student}, t)["kl"]["student"].mean(), kl_loss(W, student, teacher))


def trained(lm, name=None): return {n.replace(name, "default") if name else n: p.detach().clone() for n, p in lora_parameters(lm, name).items()}


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_adapters_trained_side_by_side_end_as_if_alone(architecture):
    lm, saes, ranks, alone = tiny(architecture), {1: random_sae()}, (1, 3, 4), {}
    for r in ranks:
        add_lora(lm, saes, rank=r)
        fit_lora(lm, saes, ROWS, **RUN)
        alone[r] = trained(lm), fidelity(lm, saes, ROWS)
        lm.delete_adapter("default")
    for r in ranks: add_lora(lm, saes, rank=r, name=f"r{r}")
    curves = fit_loras(lm, {f"r{r}": saes for r in ranks}, ROWS, **RUN)
    measured = fidelities(lm, saes, ROWS, [f"r{r}" for r in ranks])
    for r in ranks:
        together = trained(lm, f"r{r}")
        assert together.keys() == alone[r][0].keys() and any(p.abs().sum() > 0 for n, p in together.items() if "lora_B" in n)
        for n, p in together.items(): assert torch.equal(p, alone[r][0][n]), n
        assert measured[f"r{r}"] == alone[r][1]
    assert len({c[-1]["loss"] for c in curves.values()}) == len(ranks)


def test_adapters_for_several_saes_of_one_layer_side_by_side():
    lm, saes, alone = tiny("llama"), {f"s{i}": {1: random_sae(seed=i)} for i in range(2)}, {}
    for name, own in saes.items():
        add_lora(lm, own, rank=2)
        fit_lora(lm, own, ROWS, **RUN)
        alone[name] = trained(lm)
        lm.delete_adapter("default")
    for name, own in saes.items(): add_lora(lm, own, rank=2, name=name)
    fit_loras(lm, saes, ROWS, **RUN)
    for name in saes:
        for n, p in trained(lm, name).items(): assert torch.equal(p, alone[name][n]), n


def test_an_adapter_that_is_not_there_is_named():
    lm, saes = tiny("llama"), {1: random_sae()}
    add_lora(lm, saes, rank=2)
    with pytest.raises(UsageError, match="'other'"): fit_loras(lm, {"default": saes, "other": saes}, ROWS)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_prefix_and_teacher_from_the_cache_are_the_computed_ones(architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_LORA_CACHE", str(tmp_path))
    lm, saes, ends = tiny(architecture), {1: random_sae()}, []
    for cached in (False, True, True):  # the second fills the cache, the third finds it full; two epochs, and two adapters at once
        for r in (2, 3): add_lora(lm, saes, rank=r, name=f"r{r}")
        fit_loras(lm, {f"r{r}": saes for r in (2, 3)}, ROWS, **RUN | dict(tokens=2 * ROWS.numel()), cached=cached)
        ends.append([trained(lm, f"r{r}") for r in (2, 3)])
        for r in (2, 3): lm.delete_adapter(f"r{r}")
    assert len([*tmp_path.rglob("*.both")]) == 1
    for a, b, c in zip(*ends):
        for n in a:
            torch.testing.assert_close(a[n], b[n], rtol=1e-3, atol=1e-4)
            assert torch.equal(b[n], c[n]), n
    add_lora(lm, saes, rank=2)
    with pytest.raises(UsageError, match="cached=True"): fit_lora(lm, saes, ROWS, 64, "published", cached=True)


@pytest.mark.skipif(not can_compile(), reason="torch.compile does not work here: it needs a C++ compiler")
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_fused_kernels_train_the_same_adapter(architecture):
    lm, saes, ends = tiny(architecture), {1: random_sae()}, []
    for fuse in (False, True):
        add_lora(lm, saes, rank=2)
        curve = fit_lora(lm, saes, ROWS, fuse=fuse, **RUN)
        ends.append([row["loss"] for row in curve])
        lm.delete_adapter("default")
        assert all("forward" not in m.__dict__ for m in lm.modules())
    torch.testing.assert_close(torch.tensor(ends[0]), torch.tensor(ends[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_plain_attention_trains_the_same_adapter(architecture, monkeypatch):
    lm, saes, ends, rows = tiny(architecture), {1: random_sae()}, [], ROWS.clone()
    rows[::3, 9:] = -1  # padding goes into the mask, which the two build differently
    for pays in (False, True):
        monkeypatch.setattr("sae_lora.loss.SHORT", ROWS.shape[1] if pays else 0)
        seen = []
        add_lora(lm, saes, rank=2)
        curve = fit_lora(lm, saes, rows, **RUN | dict(precision="bf16"), callback=lambda row: seen.append(lm.config._attn_implementation))
        ends.append([row["loss"] for row in curve])
        lm.delete_adapter("default")
        assert set(seen) == {"eager" if pays else "sdpa"} and lm.config._attn_implementation == "sdpa"
    torch.testing.assert_close(torch.tensor(ends[0]), torch.tensor(ends[1]), rtol=2e-2, atol=1e-3)


def test_an_error_leaves_the_blocks_as_they_were():
    lm = tiny("llama")
    with pytest.raises(ZeroDivisionError):
        with compiled(lm), attention(lm, "eager"): 1 / 0
    assert all("forward" not in m.__dict__ for m in lm.modules()) and lm.config._attn_implementation == "sdpa"


TWO = """
import json, sys
sys.path.insert(0, {tests!r})
from conftest import random_sae, tiny
from test_training import ROWS
from sae_lora.lm import layers, leads, processes, shard
from sae_lora.lora import add_lora, lora_parameters, without_lora
from sae_lora.train import fit_lora
rows = ROWS.clone()
if {padded}: rows[::3, 9:] = -1
lm, saes = tiny("llama"), {{1: random_sae()}}
whole = sum(p.numel() for p in layers(lm).parameters())
if {spread}:
    shard(lm)
    assert sum(p.to_local().numel() for p in layers(lm).parameters()) < 0.6 * whole
add_lora(lm, saes, rank=2)
curve = fit_lora(lm, saes, rows, tokens=16 * 16, batch=4, precision="fp32")
if leads(): print(json.dumps([processes().num_processes if processes() else 1, [r["loss"] for r in curve], {{n: p.tolist() for n, p in lora_parameters(lm).items() if "lora_B" in n}}]))
"""


@pytest.mark.parametrize(("padded", "spread"), [(False, False), (True, False), (False, True)])
def test_two_processes_train_as_one(tmp_path, padded, spread):
    script = tmp_path / "train.py"
    def losses_of(*launcher):
        script.write_text(TWO.format(tests=str(Path(__file__).parent), padded=padded, spread=spread and bool(launcher)))
        done = subprocess.run([sys.executable, *launcher, str(script)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.strip().splitlines()[-1])
    (n, one, adapter), (m, two, twin) = losses_of(), losses_of("-m", "torch.distributed.run", "--nproc_per_node", "2")
    assert (n, m) == (1, 2)
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=0, atol=1e-5)
    for n, p in adapter.items(): torch.testing.assert_close(torch.tensor(p), torch.tensor(twin[n]), rtol=1e-3, atol=1e-4)


def test_the_unspliced_model_is_kept_where_asked():
    lm, saes, left = tiny("llama"), {1: random_sae()}, {}
    for strength in (0.0, 3.0):
        add_lora(lm, saes, rank=4)
        fit_lora(lm, saes, ROWS, **RUN | dict(tokens=64 * 16, lr=1e-2), keep_unspliced=strength)
        left[strength] = fidelity(lm, saes, ROWS)["kl"]
        lm.delete_adapter("default")
    assert left[3.0]["adapted_unspliced"] < 0.5 * left[0.0]["adapted_unspliced"] and left[3.0]["adapted"] < left[3.0]["spliced"]
    add_lora(lm, saes, rank=4)
    with pytest.raises(UsageError, match="no keep_unspliced"): fit_lora(lm, saes, ROWS, 64, "published", keep_unspliced=1.0)


def test_the_penalty_is_the_divergence_it_names():
    lm, saes, batch = tiny("gemma2"), {1: random_sae()}, {"input_ids": ROWS[:2]}
    add_lora(lm, saes, rank=4)
    for p in lora_parameters(lm).values(): p.data.normal_(0, 0.1)
    W = head(lm)
    plain, kept = (next(distill_each(lm, {None: saes}, W, batch, keep_unspliced=s)).item() for s in (0.0, 0.5))
    with torch.no_grad():
        unspliced = lm(**batch).logits.log_softmax(-1)
        with without_lora(lm): base = lm(**batch).logits.log_softmax(-1)
    assert kept - plain == pytest.approx(0.5 * float((base.exp() * (base - unspliced)).sum(-1).mean()), rel=1e-3)


def test_adapter_and_sae_train_together_at_their_own_rates():
    lm, saes = tiny("llama"), {1: random_sae()}
    add_lora(lm, saes, rank=4)
    adapter, sae = trained(lm), {n: p.clone() for n, p in saes[1].named_parameters()}
    rate = 1e-3
    fit_both(lm, saes, ROWS, tokens=16, batch=1, lr=rate, warmup=0.0, precision="fp32")  # one step of Adam moves what has a gradient by about the rate
    moved = lambda now, was: max(float((p - was[n]).abs().max()) for n, p in now.items())
    assert moved(trained(lm), adapter) == pytest.approx(rate, rel=0.05) and moved(dict(saes[1].named_parameters()), sae) == pytest.approx(rate / 10, rel=0.05)
    assert not any(p.requires_grad for p in saes[1].parameters())
