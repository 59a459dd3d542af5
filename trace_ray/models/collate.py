"""Triaged rows to padded tensors.

Layout: prompts LEFT-padded, responses RIGHT-padded, so that all responses start in one column and
logits are needed for the last ``R + 1`` positions only (``logits_to_keep``).

Axes: B rows of a batch, S sequences (a conflict has two, a retained row one), P prompt tokens,
R response tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler

from trace_ray.core.losses import CATEGORY_CODES
from trace_ray.models.chat import encode_prompt, encode_response
from trace_ray.models.packing import pack_exchanges
from trace_ray.types import Category, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row ready for training or scoring; token ids as plain lists."""

    pair_id: str
    category: Category
    weight: float
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    """Empty where the row's category has no use for it."""
    truncated: bool
    """True where a response lost its tail to ``max_length``."""
    smoothing: float = 0.0
    """Probability that an INVERT row is the wrong way round (robust DPO)."""

    @property
    def n_tokens(self) -> int:
        """Tokens that one forward pass over the row reads."""
        sides = [side for side in (self.chosen_ids, self.rejected_ids) if side]
        return len(self.prompt_ids) * len(sides) + sum(map(len, sides))


def encode_exchange(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str, max_length: int
) -> tuple[list[int], list[int], bool]:
    """Return (prompt ids, response ids, truncated): prompt tokens keep the tail, responses the head.

    A prompt is cut (from its start) to leave at least half of ``max_length`` to the response; what is
    left of it stands behind the beginning-of-sequence token that it had.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    response_ids = encode_response(tokenizer, response)
    kept = min(len(response_ids), max_length // 2)
    head = _tail(prompt_ids, max_length - kept, tokenizer.bos_token_id)
    cut = response_ids[: max_length - len(head)]
    return head, cut, len(cut) < len(response_ids) or len(head) < len(prompt_ids)


def _tail(ids: list[int], most: int, bos: Any) -> list[int]:
    """Return the last ``most`` ids, the beginning-of-sequence token of all first among them.

    Gemma's log-probabilities are garbage without it. A token that opens every turn too (ChatML's of some
    tokenizers) would open one that the cut has left without its role: it stays with the rest.
    """
    if len(ids) <= most:
        return ids
    first = ids[:1] if ids[0] == bos and ids.count(bos) == 1 else []
    return [*first, *ids[len(ids) - most + len(first) :]]


def encode_sides(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, responses: Sequence[str], max_length: int
) -> tuple[list[int], list[tuple[list[int], bool]]]:
    """Return the one prompt of all the responses, and each one's (ids, truncated).

    Responses that are compared must follow the same words: the shortest cut of the prompt serves all.
    """
    sides = [encode_exchange(tokenizer, prompt, text, max_length) for text in responses]
    prompt_ids = min((ids for ids, _, _ in sides), key=len)
    return prompt_ids, [(ids, cut or len(own) > len(prompt_ids)) for own, ids, cut in sides]


def encode_row(
    tokenizer: PreTrainedTokenizerBase,
    row: dict[str, Any],
    prompt: Prompt,
    *,
    category: Category,
    weight: float,
    max_length: int,
    smoothing: float = 0.0,
    pair_retained: bool = False,
) -> EncodedRow:
    """Encode a row; one whose ``rejected`` is None has its ``chosen`` side only.

    So has a RETAIN row, unless ``pair_retained``.
    """
    paired = row["rejected"] is not None and (pair_retained or category is not Category.RETAIN)
    responses = [row["chosen"], row["rejected"]] if paired else [row["chosen"]]
    prompt_ids, sides = encode_sides(tokenizer, prompt, responses, max_length)
    rejected_ids = sides[1][0] if paired else []
    cut = any(cut for _, cut in sides)
    return EncodedRow(
        row["pair_id"], category, weight, prompt_ids, sides[0][0], rejected_ids, cut, smoothing
    )


def pad_sequences(sequences: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Pad (prompt ids, response ids) pairs.

    Returns:
        ``input_ids``, ``attention_mask``, ``position_ids`` [S, P + R] int64, ``labels`` [S, R] int64
        (response ids, padding holds 0) and ``mask`` [S, R] float32, 1 on response tokens.
    """
    width_p = max(len(prompt) for prompt, _ in sequences)
    width_r = max(len(response) for _, response in sequences)
    ids = torch.zeros(len(sequences), width_p + width_r, dtype=torch.int64)
    seen = torch.zeros_like(ids)
    for i, (prompt, response) in enumerate(sequences):
        start, end = width_p - len(prompt), width_p + len(response)
        ids[i, start:end] = torch.tensor([*prompt, *response])
        seen[i, start:end] = 1
    return {
        "input_ids": ids,
        "attention_mask": seen,
        "position_ids": (seen.cumsum(1) - 1).clamp(min=0),
        "labels": ids[:, width_p:].clone(),
        "mask": seen[:, width_p:].float(),
    }


@dataclass(frozen=True, slots=True)
class HybridCollator:
    """Rows of mixed categories to one batch.

    The sequences are ordered: all B ``chosen``, then the ``rejected`` of the rows that have one.
    """

    pack: bool
    """Share common prefixes instead of padding."""

    def __call__(self, rows: Sequence[EncodedRow]) -> dict[str, Any]:
        """Return the batch.

        ``paired`` holds the rows whose ``rejected`` is in it; ``scored`` [B] float32 is 1 on the rows
        whose log-probabilities the loss reads: all but RETAIN rows without a ``rejected``; and
        ``retained`` is a batch of the ``chosen`` of RETAIN rows alone, where there are any.
        """
        paired = [i for i, row in enumerate(rows) if row.rejected_ids]
        sequences = [(row.prompt_ids, row.chosen_ids) for row in rows]
        sequences += [(rows[i].prompt_ids, rows[i].rejected_ids) for i in paired]
        lay_out = pack_exchanges if self.pack else pad_sequences
        batch: dict[str, Any] = lay_out(sequences)
        batch |= {
            "pair_ids": [row.pair_id for row in rows],
            "category": torch.tensor([CATEGORY_CODES[row.category] for row in rows]),
            "weight": torch.tensor([row.weight for row in rows], dtype=torch.float32),
            "smoothing": torch.tensor([row.smoothing for row in rows], dtype=torch.float32),
            "paired": torch.tensor(paired, dtype=torch.int64),
        }
        scored = [row.category is not Category.RETAIN or bool(row.rejected_ids) for row in rows]
        batch["scored"] = torch.tensor(scored, dtype=torch.float32)
        kept = [(r.prompt_ids, r.chosen_ids) for r in rows if r.category is Category.RETAIN]
        if kept:
            batch["retained"] = lay_out(kept)
        return batch


@dataclass(frozen=True, slots=True)
class StepCollator:
    """The rows of one optimizer step to micro-batches of at most ``max_tokens`` tokens each.

    Data-parallel workers draw the same rows and take every ``workers``-th of them, so that a step
    holds the same rows on any number of workers.
    """

    collator: HybridCollator
    max_tokens: int | None
    """None: the step is one batch. A row that is longer by itself is a micro-batch of its own."""
    rank: int = 0
    workers: int = 1

    def __call__(self, rows: Sequence[EncodedRow]) -> dict[str, Any]:
        """Return ``{"micro_batches": [...], "counted": [bool, ...], "pair_ids": [...]}``.

        Rows keep their order; ``pair_ids`` are the whole step's.

        All workers get as many micro-batches, because they meet in every pass. Where a worker has
        fewer, the step's first row stands in, not ``counted``: its loss must count for nothing.
        """
        shares = [rows[rank :: self.workers] for rank in range(self.workers)]
        parts = [list(split_by_tokens(share, self.max_tokens)) for share in shares]
        mine = parts[self.rank]
        idle = max(map(len, parts)) - len(mine)
        micro_batches = [self.collator(part) for part in [*mine, *[rows[:1]] * idle]]
        return {
            "micro_batches": micro_batches,
            "counted": [True] * len(mine) + [False] * idle,
            "pair_ids": [row.pair_id for row in rows],
        }


def split_by_tokens(
    rows: Sequence[EncodedRow], max_tokens: int | None
) -> Iterator[list[EncodedRow]]:
    """Cut ``rows`` into runs of at most ``max_tokens`` tokens (counted without sharing prefixes)."""
    part: list[EncodedRow] = []
    total = 0
    for row in rows:
        if part and max_tokens is not None and total + row.n_tokens > max_tokens:
            yield part
            part, total = [], 0
        part.append(row)
        total += row.n_tokens
    if part:
        yield part


class BucketSampler(Sampler[int]):
    """Seeded shuffling that puts rows of like length into one batch.

    Rows are shuffled, cut into groups of ``span`` batches, sorted by length within the group, cut into
    batches, and the batches shuffled: categories stay mixed, padding stays small. The order depends
    on (seed, epoch) alone, so that a resumed epoch goes on where it stopped.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, span: int = 8):
        self.lengths, self.batch_size, self.seed, self.span = list(lengths), batch_size, seed, span
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        group = self.batch_size * self.span
        batches: list[list[int]] = []
        for start in range(0, len(order), group):
            near = sorted(order[start : start + group], key=lambda i: self.lengths[i])
            batches += [near[i : i + self.batch_size] for i in range(0, len(near), self.batch_size)]
        # A short batch anywhere but last would shift every batch after it.
        full = [batch for batch in batches if len(batch) == self.batch_size]
        short = [batch for batch in batches if len(batch) < self.batch_size]
        for i in torch.randperm(len(full), generator=generator).tolist():
            yield from full[i]
        for batch in short:
            yield from batch
