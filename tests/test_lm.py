"""Where a model goes, in what format, what does not fit, and several processes reading it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny

from sae_lora import devices
from sae_lora import lm as module
from sae_lora.devices import default_device
from sae_lora.files import UsageError
from sae_lora.hidden import _Reached, hidden
from sae_lora.lm import device_of, head, load_lm, on_device

IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    "A folder with a tiny model, and the tokenizer of no words that goes with it."
    from worlds import tokenizer

    tiny("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_a_gpu_is_chosen_where_there_is_one(monkeypatch):
    for cuda, mps, chosen in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        assert default_device() == chosen


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "mps:7"])
def test_a_device_that_does_not_exist(saved, device):
    with pytest.raises(
        UsageError, match=f"device '{device}' does not exist here; give cpu"
    ) as told:
        load_lm(saved, device=device)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("emulated", [True, False])
def test_bfloat16_only_where_the_hardware_has_it(monkeypatch, emulated):
    from contextlib import nullcontext

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or not emulated,
    )
    assert devices.default_dtype(torch.device("cuda")) == (
        torch.float32 if emulated else torch.bfloat16
    )
    for other in ("cpu", "mps"):
        assert devices.default_dtype(torch.device(other)) == torch.float32


def test_memory_of_the_device_that_was_used():
    assert 10**7 < devices.peak_memory("cpu") < devices.memory_of("cpu") < 2**50


@pytest.mark.parametrize(
    "share, dtype, ways",
    [
        (1 / 3, None, "another device or --shard on several processes"),
        (
            2 / 3,
            None,
            "dtype=torch.bfloat16 (0.0 GB), another device or --shard on several processes",
        ),
        (2 / 3, torch.bfloat16, "another device or --shard on several processes"),
    ],
)
def test_a_model_without_room(saved, monkeypatch, share, dtype, ways):
    size = devices.weight_bytes(load_lm(saved, dtype)[0])
    monkeypatch.setattr(devices, "free_memory", lambda device: share * size)
    with pytest.raises(
        UsageError, match="needs about .* GB in .* and cpu has .* GB free; give"
    ) as told:
        load_lm(saved, dtype)
    assert str(told.value).endswith(f"free; give {ways}") and "\n" not in str(told.value)
    monkeypatch.setattr(devices, "free_memory", lambda device: size)
    load_lm(saved, dtype)


def test_running_out_while_moving_is_told_too(saved, monkeypatch):
    import transformers

    def full(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(transformers.PreTrainedModel, "to", full)
    with pytest.raises(
        UsageError,
        match="cpu has less free; give dtype=torch.bfloat16 .*, another device or --shard",
    ):
        load_lm(saved)


def test_rows_may_lie_elsewhere():
    "A model on a device of which nothing is computed: what comes in has to be there."
    lm, batch = tiny("llama").to("meta"), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    entered = []

    def enters(module_, args, kwargs):
        entered.extend(kwargs[name].device.type for name in batch)
        raise _Reached

    assert device_of(lm).type == "meta"
    assert {x.device.type for x in on_device(lm, batch).values()} == {"meta"}
    lm.register_forward_pre_hook(enters, with_kwargs=True)
    for layer in (-1, 1, "final"):
        with pytest.raises(RuntimeError, match="was never reached"):
            hidden(lm, batch, layer)
    assert entered == ["meta"] * 6


@pytest.mark.parametrize("name", ["llama", "phi", "gemma2"])
@torch.no_grad()
def test_a_head_in_float32(name):
    lm = tiny(name).bfloat16()
    W, h = head(lm), hidden(lm, {"input_ids": IDS}, "final")
    exact = W.float()
    assert (
        exact.weight.dtype == torch.float32
        and (exact.bias is None) == (W.bias is None)
        and exact[2:] == W[2:]
    )
    weight, bias = W.weight.double(), 0 if W.bias is None else W.bias.double()
    z = (h.double() @ weight.T + bias) * W.scale
    if W.softcap:
        z = W.softcap * torch.tanh(z / W.softcap)
    torch.testing.assert_close(exact(h.float()).double(), z, rtol=1e-5, atol=1e-5)
    assert exact.float().weight is exact.weight


TWO = """
import json, sys, time, weakref
from sae_lora import lm as module
from sae_lora.lm import decoder_blocks, load_lm, sharded
from sae_lora.processes import processes
import torch
times, whole, read, keep = [], [], module.from_pretrained, module._keep_part
def reading(name, dtype):
    times.append(time.monotonic())
    time.sleep(0.3)
    lm, tok = read(name, dtype)
    whole.extend(weakref.ref(p) for p in decoder_blocks(lm).parameters())
    return lm, tok
def keeping(lm, mesh):
    lm = keep(lm, mesh)
    times.append(time.monotonic())
    return lm
module.from_pretrained, module._keep_part = reading, keeping
lm, _ = load_lm(sys.argv[1], dtype=torch.bfloat16, spread=True)
blocks = list(decoder_blocks(lm).parameters())
mine = sum(p.to_local().numel() for p in blocks)
share = mine / sum(p.numel() for p in blocks)
ids = torch.arange(3, 15)[None]
with torch.no_grad():
    z = lm(ids).logits.float()[0, -1, :5].tolist()
rank = processes().process_index
left = sum(w() is not None for w in whole)
trains = any(p.requires_grad for p in lm.parameters())
found = dict(rank=rank, times=times, share=share, left=left, dtype=str(lm.dtype), z=z)
with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
    json.dump(found | dict(spread=sharded(lm), trains=trains), file)
"""


def test_two_processes_read_a_model_in_turn(saved, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        str(script),
        str(saved),
    ]
    here = os.pathsep.join(
        filter(None, [str(Path(module.__file__).parent.parent), os.environ.get("PYTHONPATH")])
    )
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": here},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [
        json.loads((saved / f"{rank}.json").read_text()) for rank in (0, 1)
    ]  # two processes, or nothing was tested
    first, second = (r["times"] for r in found)
    assert (
        len(first) == len(second) == 2 and first[1] <= second[0]
    )  # the second begins to read when the first has kept its part
    lm, _ = load_lm(saved, dtype=torch.bfloat16, device="cpu")
    with torch.no_grad():
        z = lm(torch.arange(3, 15)[None]).logits.float()[0, -1, :5]
    for r in found:
        assert (
            r["share"] < 0.6
            and r["left"] == 0
            and r["spread"]
            and not r["trains"]
            and r["dtype"] == "torch.bfloat16"
        )
        torch.testing.assert_close(torch.tensor(r["z"]), z, rtol=1e-2, atol=1e-2)
