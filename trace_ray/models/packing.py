"""Sequences that start alike, computed once: a token trie packed into one row.

The two responses of a pair share their prompt, all questions of a judge share the policy, all chats
share the template's opening. Each distinct prefix becomes one node path of a trie; the trie's T nodes
are laid out in one row of T tokens, in which a token sees its ancestors alone and has its depth as
position. For a causal model without dropout this is the same function as separate sequences (tested),
on fewer tokens and with no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

HIDDEN = -1.0e9
"""Additive attention mask of a token that may not be seen; finite, so that bfloat16 can hold it."""


@dataclass(frozen=True, slots=True)
class Trie:
    """The packed row and where each sequence's tokens stand in it."""

    input_ids: torch.Tensor
    """[1, T] int64."""
    position_ids: torch.Tensor
    """[1, T] int64: depth in the trie."""
    attention_mask: torch.Tensor
    """[1, 1, T, T] float32, additive: 0 where row may see column, else ``HIDDEN``."""
    paths: list[list[int]]
    """Per sequence the place of each of its tokens in the row."""


def build_trie(sequences: Sequence[Sequence[int]]) -> Trie:
    """Merge token sequences by their common prefixes."""
    tokens: list[int] = []
    parents: list[int] = []
    known: dict[tuple[int, int], int] = {}
    paths = []
    for sequence in sequences:
        node, path = -1, []
        for token in sequence:
            step = (node, token)
            if step not in known:
                known[step] = len(tokens)
                tokens.append(token)
                parents.append(node)
            node = known[step]
            path.append(node)
        paths.append(path)
    seen = torch.eye(len(tokens), dtype=torch.bool)
    depth = [0] * len(tokens)
    for node, parent in enumerate(parents):  # a parent always stands before its children
        if parent >= 0:
            seen[node] |= seen[parent]
            depth[node] = depth[parent] + 1
    mask = torch.zeros(len(tokens), len(tokens)).masked_fill(~seen, HIDDEN)
    return Trie(torch.tensor([tokens]), torch.tensor([depth]), mask[None, None], paths)


def pack_exchanges(sequences: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Pack (prompt ids, response ids) pairs for ``trainer.response_logits``.

    Returns:
        ``input_ids``, ``position_ids`` [1, T] and ``attention_mask`` [1, 1, T, T] of the trie, in
        which the exchanges of one prompt stand side by side; ``bounds`` [G + 1] int64, where each
        prompt's own tokens start, and T; ``keep`` [K] int64, the places whose logits are needed;
        ``gather`` [S, R] int64, for each response token the row of ``keep`` that predicts it;
        ``labels`` [S, R] int64 and ``mask`` [S, R] float32 as in ``collate.pad_sequences``.
    """
    trie, paths, bounds = _side_by_side(sequences)
    predictors = [paths[s][len(prompt) - 1 : -1] for s, (prompt, _) in enumerate(sequences)]
    keep = sorted({place for places in predictors for place in places})
    row_of = {place: row for row, place in enumerate(keep)}
    width = max(len(response) for _, response in sequences)
    gather = torch.zeros(len(sequences), width, dtype=torch.int64)
    labels, mask = torch.zeros_like(gather), torch.zeros(len(sequences), width)
    for s, (places, (_, response)) in enumerate(zip(predictors, sequences, strict=True)):
        gather[s, : len(response)] = torch.tensor([row_of[place] for place in places])
        labels[s, : len(response)] = torch.tensor(response)
        mask[s, : len(response)] = 1
    return {
        "input_ids": trie.input_ids,
        "position_ids": trie.position_ids,
        "attention_mask": trie.attention_mask,
        "bounds": torch.tensor(bounds),
        "keep": torch.tensor(keep),
        "gather": gather,
        "labels": labels,
        "mask": mask,
    }


def pack_groups(groups: Sequence[Sequence[tuple[list[int], list[int]]]]) -> dict[str, torch.Tensor]:
    """Pack groups of (prompt ids, response ids), each group a trie in a row of its own.

    Attention costs the square of a row's tokens: many small rows cost less than ``pack_exchanges``'s
    one, and no two rows meet, so a derivative of each can be taken in one pass.

    Returns:
        ``input_ids``, ``position_ids`` [N, W] and ``attention_mask`` [N, 1, W, W], rows padded on the
        right with tokens that see themselves alone; ``keep`` [K] int64, the places in the N * W
        tokens whose logits are needed; ``gather``, ``labels`` and ``mask`` [S, R], over the exchanges
        of all groups in order, as in ``pack_exchanges``.
    """
    packed = [pack_exchanges(group) for group in groups]
    height = max(batch["input_ids"].shape[1] for batch in packed)
    width = max(batch["labels"].shape[1] for batch in packed)
    ids = torch.zeros(len(packed), height, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    seen = torch.full((len(packed), 1, height, height), HIDDEN)
    seen.diagonal(dim1=2, dim2=3).fill_(0)
    keep, sides, rows = [], [], 0
    for n, batch in enumerate(packed):
        size = batch["input_ids"].shape[1]
        ids[n, :size], positions[n, :size] = batch["input_ids"][0], batch["position_ids"][0]
        seen[n, :, :size, :size] = batch["attention_mask"][0]
        keep.append(batch["keep"] + n * height)
        short = (0, width - batch["labels"].shape[1])
        shifted = {
            "gather": batch["gather"] + rows,
            "labels": batch["labels"],
            "mask": batch["mask"],
        }
        sides.append({name: torch.nn.functional.pad(v, short) for name, v in shifted.items()})
        rows += len(batch["keep"])
    joined = {
        name: torch.cat([side[name] for side in sides]) for name in ("gather", "labels", "mask")
    }
    return {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": seen,
        "keep": torch.cat(keep),
    } | joined


def _side_by_side(
    sequences: Sequence[tuple[list[int], list[int]]],
) -> tuple[Trie, dict[int, list[int]], list[int]]:
    """Return the trie with the exchanges of one prompt together, their paths, and its bounds."""
    first: dict[tuple[int, ...], int] = {}
    groups = [first.setdefault(tuple(prompt), s) for s, (prompt, _) in enumerate(sequences)]
    order = sorted(range(len(sequences)), key=groups.__getitem__)
    trie = build_trie([[*sequences[s][0], *sequences[s][1]] for s in order])
    paths = dict(zip(order, trie.paths, strict=True))
    ends: dict[int, int] = {}
    reached = 0
    for s in order:
        ends[groups[s]] = reached = max(reached, max(paths[s]) + 1)
    return trie, paths, [0, *dict.fromkeys(ends.values())]


def can_pack(config: Any, max_length: int) -> bool:
    """Say whether packing is exact and worth it for a model config and sequences of ``max_length``.

    A sliding window shorter than the sequences would hide ancestors that the packed mask shows; on a
    GPU, padded batches keep the fused attention kernels.
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    return not torch.cuda.is_available() and (window is None or window >= max_length)
