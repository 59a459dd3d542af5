"""Attention over a packed row, block by block.

The tokens of one prompt and its responses stand side by side in a packed row (``packing``) and see each
other and a few shared ancestors, nothing of the other blocks. One dense T x T attention would compute
all of it and hide most; one call per block computes what is seen.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCKWISE = "blockwise"
"""Name of the attention implementation; without blocks it is transformers' ``sdpa``."""


@dataclass(frozen=True, slots=True)
class Block:
    """Rows ``start`` to ``end`` of a packed row and what they see."""

    start: int
    end: int
    keys: torch.Tensor
    """[N] int64: the ancestors outside the block, then the block's own rows."""
    mask: torch.Tensor
    """[1, 1, end - start, N], additive."""


def attention_blocks(mask: torch.Tensor, bounds: torch.Tensor) -> list[Block]:
    """Cut the additive mask [1, 1, T, T] of a packed row at ``bounds`` (0, ..., T)."""
    blocks = []
    for start, end in itertools.pairwise(bounds.tolist()):
        outer = (mask[0, 0, start:end, :start] == 0).any(0).nonzero().squeeze(1)
        keys = torch.cat([outer, torch.arange(start, end, device=mask.device)])
        blocks.append(Block(start, end, keys, mask[:, :, start:end, keys]))
    return blocks


def blockwise_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    blocks: list[Block] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as ``sdpa`` does, within ``blocks`` where the row is packed.

    Args:
        module: the attention layer.
        query: [B, heads, T, D].
        key: [B, key-value heads, T, D].
        value: as ``key``.
        attention_mask: of the whole row; the blocks have it too.
        blocks: from ``attention_blocks``; B is 1 then.
        kwargs: what transformers gives to any attention implementation.

    Returns:
        [B, T, heads, D], and no attention weights.
    """
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    groups = query.shape[1] // key.shape[1]
    found = [
        scaled_dot_product_attention(
            query[:, :, block.start : block.end],
            repeat_kv(key[:, :, block.keys], groups),
            repeat_kv(value[:, :, block.keys], groups),
            attn_mask=block.mask,
            dropout_p=kwargs.get("dropout", 0.0),
            scale=kwargs.get("scaling"),
        )
        for block in blocks
    ]
    return torch.cat(found, 2).transpose(1, 2), None


AttentionInterface.register(BLOCKWISE, blockwise_attention)
AttentionMaskInterface.register(BLOCKWISE, sdpa_mask)
