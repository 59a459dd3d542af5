"""Log-probabilities: alignment, masking, precision."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_ray.core.logprobs import sequence_logps, token_logps


def test_token_logps_by_hand() -> None:
    # V = 3, z = log(1, 2, 5): softmax is (1, 2, 5) / 8: log p(2) = log(5/8), log p(0) = log(1/8).
    z = torch.log(torch.tensor([1.0, 2.0, 5.0]))
    logits = z.expand(1, 3, 3)
    labels = torch.tensor([[2, 0, 1]])
    mask = torch.tensor([[1, 1, 0]])
    expected = torch.tensor([[math.log(5 / 8), math.log(1 / 8), 0.0]])
    torch.testing.assert_close(token_logps(logits, labels, mask), expected)
    # log(5/8) + log(1/8) = log(5/64)
    total = sequence_logps(logits, labels, mask)
    torch.testing.assert_close(total, torch.tensor([math.log(5 / 64)]))


def test_alignment_with_a_whole_sequence() -> None:
    """With logits_to_keep = R + 1, position t is the prediction made one token earlier."""
    torch.manual_seed(0)
    prompt_len, n_response, vocab = 4, 3, 11
    ids = torch.randint(vocab, (2, prompt_len + n_response))
    table = torch.randn(vocab, vocab, dtype=torch.float64)  # a bigram model: logits = table[id]
    logits = table[ids]
    kept = logits[:, -(n_response + 1) : -1]
    assert kept.shape == (2, n_response, vocab)
    got = token_logps(kept, ids[:, prompt_len:], torch.ones(2, n_response))
    for b in range(2):
        for t in range(n_response):
            previous, token = ids[b, prompt_len + t - 1], ids[b, prompt_len + t]
            torch.testing.assert_close(got[b, t], table[previous].log_softmax(-1)[token])


def test_padding_neither_counts_nor_leaks_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 7, requires_grad=True)
    labels = torch.randint(7, (2, 4))
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    other = labels.masked_fill(~mask, 0)
    sums = sequence_logps(logits, labels, mask)
    torch.testing.assert_close(sums, sequence_logps(logits, other, mask))
    (grad,) = torch.autograd.grad(sums.sum(), logits)
    assert torch.equal(grad[~mask], torch.zeros_like(grad[~mask]))
    assert grad[mask].abs().sum() > 0


def test_precision() -> None:
    torch.manual_seed(0)
    labels, mask = torch.randint(50, (1, 5)), torch.ones(1, 5)
    low = torch.randn(1, 5, 50).bfloat16()
    exact = low.double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    got = token_logps(low, labels, mask)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, atol=1e-6, rtol=0)
    assert token_logps(low.double(), labels, mask).dtype == torch.float64
    large = torch.tensor([[[1e4, 0.0]]])  # the loser's log-probability is -1e4, not -inf
    assert token_logps(large, torch.tensor([[1]]), torch.ones(1, 1)).item() == -1e4


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(2, 9), st.integers(0, 999))
def test_batching_and_padding_do_not_matter(b: int, r: int, v: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(b, r, v, generator=rng, dtype=torch.float64)
    labels = torch.randint(v, (b, r), generator=rng)
    lengths = torch.randint(1, r + 1, (b,), generator=rng)
    mask = torch.arange(r) < lengths[:, None]
    together = sequence_logps(logits, labels, mask)
    for i in range(b):
        n = int(lengths[i])
        alone = sequence_logps(logits[i : i + 1, :n], labels[i : i + 1, :n], torch.ones(1, n))
        torch.testing.assert_close(together[i : i + 1], alone)


def test_a_table_of_shared_predictions_gives_the_same() -> None:
    torch.manual_seed(0)
    table = torch.randn(5, 7, requires_grad=True)
    at = torch.tensor([[0, 1, 4], [0, 3, 0]])
    labels, mask = torch.tensor([[1, 6, 2], [3, 0, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    shared = sequence_logps(table, labels, mask, at)
    torch.testing.assert_close(shared, sequence_logps(table[at], labels, mask))
    (gradient,) = torch.autograd.grad(shared.sum(), table, retain_graph=True)
    (expected,) = torch.autograd.grad(sequence_logps(table[at], labels, mask).sum(), table)
    torch.testing.assert_close(gradient, expected)
