"""Chunked reductions over the vocabulary against plain operations."""

from __future__ import annotations

import pytest
import torch

from trace_ray.core import vocabulary

ROWS = torch.tensor([4, 0, 4, 4, 2, 0])
REF_ROWS = torch.tensor([1, 3, 4, 0, 2, 2])
LABELS = torch.tensor([1, 6, 1, 3, 0, 5])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "CHUNK_ELEMENTS", 2 * 7)


def table(seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(5, 7, generator=rng, dtype=torch.float64, requires_grad=True)


def test_picked_logps_and_both_derivatives() -> None:
    z = table(0)
    plain = z.log_softmax(-1)[ROWS, LABELS]
    got = vocabulary.picked_logps(z, ROWS, LABELS)
    torch.testing.assert_close(got, plain)
    upstream = torch.arange(1.0, 7.0, dtype=torch.float64)
    (expected,) = torch.autograd.grad(plain, z, upstream)
    torch.testing.assert_close(torch.autograd.grad(got, z, upstream)[0], expected)
    tangent = table(1).detach()
    _, forward = torch.func.jvp(
        lambda point: vocabulary.picked_logps(point, ROWS, LABELS), (z.detach(),), (tangent,)
    )
    _, exact = torch.func.jvp(
        lambda point: point.log_softmax(-1)[ROWS, LABELS], (z.detach(),), (tangent,)
    )
    torch.testing.assert_close(forward, exact)


def test_row_kl_and_its_gradient() -> None:
    z, ref = table(0), table(1)
    p = ref.log_softmax(-1)[REF_ROWS]
    plain = (p.exp() * (p - z.log_softmax(-1)[ROWS])).sum(-1)
    got = vocabulary.row_kl(z, ROWS, ref, REF_ROWS)
    torch.testing.assert_close(got, plain)
    (expected,) = torch.autograd.grad(plain.sum(), z)
    (grad,) = torch.autograd.grad(got.sum(), z)
    torch.testing.assert_close(grad, expected)
    assert vocabulary.row_kl(z, ROWS, z, ROWS).tolist() == [0.0] * len(ROWS)


def test_no_rows() -> None:
    none = torch.tensor([], dtype=torch.int64)
    z = table(0)
    total = vocabulary.picked_logps(z, none, none).sum() + vocabulary.row_kl(z, none, z, none).sum()
    assert total.item() == 0
    assert torch.autograd.grad(total, z)[0].abs().sum() == 0
