"""The losses and their gradients are the naive ones."""

import pytest
import torch

from sae_lora.lm import Head
from sae_lora.loss import kl_loss, losses


@pytest.mark.parametrize(
    "scale, softcap, bias",
    [(1.0, 0.0, False), (0.25, 0.0, True), (1.0, 5.0, False), (0.7, 3.0, True)],
)
@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_loss_and_gradient_are_the_naive_ones_in_fp64(scale, softcap, bias, chunk):
    torch.manual_seed(0)
    W = Head(
        torch.randn(300, 12, dtype=torch.double),
        torch.randn(300, dtype=torch.double) if bias else None,
        scale,
        softcap,
    )
    teacher, student = torch.randn(2, 100, 12, dtype=torch.double)
    x, y = student.clone().requires_grad_(), student.clone().requires_grad_()
    ours, naive = (
        kl_loss(W, x, teacher, chunk),
        torch.nn.functional.kl_div(
            W(y).log_softmax(-1), W(teacher).log_softmax(-1), log_target=True, reduction="sum"
        )
        / 100,
    )
    (3 * ours).backward()
    (3 * naive).backward()
    torch.testing.assert_close(ours, naive, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-14)


def test_measured_and_trained_loss_are_one():
    torch.manual_seed(0)
    W = Head(torch.randn(300, 12), None, 1.0, 5.0)
    teacher, student = torch.randn(2, 100, 12)
    t = torch.randint(0, 300, (100,))
    torch.testing.assert_close(
        losses(W, {"base": teacher, "student": student}, t)["kl"]["student"].mean(),
        kl_loss(W, student, teacher),
    )
