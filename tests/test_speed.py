"""What is counted is right, and every kind of row can be made."""

import pytest
import torch
from conftest import random_sae, tiny

from sae_lora import speed
from sae_lora.speed import IN_PROCESSES, ON_BENCH, VARIANTS, Bench

ROW = dict(model="tiny", text="none", length=16, sae="none", adapter_rank=2, seed=0, fuse=False)


@pytest.fixture
def bench():
    "A bench with a tiny model; a function that takes what a row asks for."
    g = torch.Generator().manual_seed(0)
    rows, long = (torch.randint(3, 97, (n, m), generator=g) for n, m in ((64, 16), (2, 1024)))
    lm = tiny("llama")
    return lambda **own: Bench(lm, {1: random_sae()}, rows, rows[:4], long, ROW | own)


def test_operations_are_counted_from_shapes():
    lm, sae = tiny("llama"), random_sae()
    block = sum(p.numel() for p in lm.model.layers[0].parameters() if p.dim() > 1)
    lora = sum(2 * sum(p.shape) for p in lm.model.layers[0].parameters() if p.dim() > 1)
    head, latents = 97 * 32, 32 * 64
    there_and_back = 2 * block + 3 * (2 * block) + 3 * (2 * lora) + 3 * head + latents
    assert speed.needed(lm, {1: sae}, 2) == 2 * there_and_back


def test_rates_are_between_points():
    curve = [dict(tokens=n * 10, seconds=s) for n, s in ((1, 5.0), (2, 6.0), (3, 6.5), (5, 8.5))]
    assert speed.rates(curve) == [20.0, 10.0]
    with pytest.raises(ValueError, match="2 points"):
        speed.rates(curve[:2])


MLP = dict(point="hook_mlp_out")
SITES = {"output": {}, "MLP out": MLP, "transcoder": MLP | dict(transcoder=True)}


@pytest.mark.parametrize(
    "what, own",
    [
        ("batches", dict(rows_a_step=[1, 2], steps=4)),
        ("sae_training", dict(tokens=4096, width=64, k=4)),
        ("sweep", dict(ranks=[1, 2], single=2, tokens=256)),
        ("splice", dict(rounds=1)),
        ("sites", dict(rounds=1, sites=SITES, width=64, k=4)),
        ("time_to_loss", dict(recipe="fast", tokens=128, points=2)),
    ],
)
def test_rows_on_the_bench(bench, what, own, monkeypatch, tmp_path):
    monkeypatch.setenv("SAE_LORA_CACHE", str(tmp_path))
    b = bench(**own)
    if what == "sae_training":
        b = b._replace(rows=b.rows.repeat(8, 1))
    assert ON_BENCH[what](b) and not getattr(b.lm, "peft_config", None)


def test_transcoders_in_every_block_leave_no_mlp_to_compute(bench, monkeypatch):
    b = bench(rounds=1, sites=SITES, width=64, k=4)
    ran = dict.fromkeys(SITES, 0)
    for name, about in SITES.items():
        saes = speed._everywhere(b, **about)
        assert len(saes) == b.lm.config.num_hidden_layers
        for block in b.lm.model.layers:
            block.mlp.down_proj.register_forward_hook(
                lambda *_, name=name: ran.update({name: ran[name] + 1})
            )
        speed._forward(b, {name: saes}, keep="none")
        for block in b.lm.model.layers:
            block.mlp.down_proj._forward_hooks.clear()
    assert ran["transcoder"] == 0 < ran["output"] == ran["MLP out"]


def test_each_variant_has_its_own_speed(bench, monkeypatch):
    monkeypatch.setattr(speed, "matmul_rate", lambda dtype, where: 1.0)
    seen = []
    monkeypatch.setattr(speed, "_some_steps", lambda b, v: seen.append(v) or [len(seen)])
    found = speed.steps(bench(rounds=2, steps=1))
    plain = [v for v in VARIANTS if "fused" not in v]
    assert seen == plain * 3  # by turns; the first round is not counted
    assert found["tokens_per_second"] == {v: 5.5 + i for i, v in enumerate(plain)}
    assert found["matmul"] == {"float32": 1.0, "bfloat16": 1.0}


def test_rows_in_processes_of_their_own(monkeypatch):
    "What is run there, and with what in the environment."
    asked = []

    def in_process(function, environment=None, **arguments):
        asked.append((function, environment, arguments))
        return float(len(asked))

    monkeypatch.setattr(speed, "in_process", in_process)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert IN_PROCESSES["loss_memory"](dict(vocabulary=9, positions=80)) == dict(naive=8, ours=2)
    assert [a["positions"] for _, _, a in asked] == [10, 80]
    assert IN_PROCESSES["flat_memory"](dict(tokens=5)) == dict(short=3, long=4)
    found = IN_PROCESSES["shared_core"](dict(spins=[0, 9]))
    assert list(found["alone"]) == list(found["beside"]) == ["as it is", "0", "9", "one thread"]
    threads = [environment.get("OMP_NUM_THREADS") for _, environment, _ in asked[4:8]]
    assert threads == [None, None, None, "1"]


def test_a_number_from_a_process_of_its_own():
    small = dict(vocabulary=256, positions=64)
    assert speed.in_process("loss_peak", ours=True, **small) >= 0
