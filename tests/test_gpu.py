"""The entries of `device_entries.py` on a GPU: `pytest -m gpu`; skipped where there is none."""

import pytest
import torch
from device_entries import ENTRIES, conditions, judged, not_finite, trained, tried

from sae_lora.arithmetic import can_compile

APPLE = torch.backends.mps.is_available()
DEVICE = "cuda" if torch.cuda.is_available() else "mps" if APPLE else None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE is None, reason="no GPU: neither CUDA nor MPS is there"),
]

# Of the size of a result. A GPU adds in another order than a CPU and rounds exp and tanh otherwise,
# about 1e-7 each; steps of Adam, which divides a small gradient by its own size, make more of it.
TOLERANCE = 1e-4


def needed(entry: str):
    "Skip an entry where a package that it needs is not there."
    for package in ENTRIES[entry].needs:
        pytest.importorskip(package)


@pytest.fixture(autouse=True)
def full_float32():
    "Products of float32 are not rounded to TF32, whatever another test has asked for."
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("entry", ENTRIES)
def test_numbers_on_a_gpu_are_the_cpus(entry):
    needed(entry)
    result = judged(tried(entry, "cpu", torch.float32), tried(entry, DEVICE, torch.float32))
    assert not result["error"], result["error"]
    assert result["apart"] < TOLERANCE, f"{result['path']} is off by {result['apart']:.1e}"
    assert not result["products"], "matrices are multiplied on the CPU"


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_model_in_bfloat16_on_a_gpu(entry):
    needed(entry)
    result = tried(entry, DEVICE, torch.bfloat16)
    assert not result["error"], result["error"]
    assert not not_finite(result["result"]) and not result["products"]


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_fused_kernels_on_a_gpu_train_the_same_adapter(architecture):
    if not can_compile(DEVICE):
        pytest.skip("torch.compile does not work here")
    with conditions():
        plain, fused = (
            trained(DEVICE, torch.float32, architecture=architecture, fuse=fuse)
            for fuse in (False, True)
        )
    torch.testing.assert_close(plain["losses"], fused["losses"], rtol=1e-3, atol=1e-4)
