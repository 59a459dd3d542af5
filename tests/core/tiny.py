"""A tiny language model with LoRA factors, for tests of derivatives and scores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trace_ray.core.impact import gold_gradient, gold_objective
from trace_ray.core.logprobs import sequence_logps

BETA = 0.3


class TinyLM(nn.Module):
    """Two layers with LoRA factors (A, B) on frozen weights; no attention is needed here."""

    def __init__(self, vocab: int = 13, width: int = 8, rank: int = 2) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.randn(vocab, width), requires_grad=False)
        self.base = nn.Parameter(torch.randn(2, width, width) / width**0.5, requires_grad=False)
        self.head = nn.Parameter(torch.randn(vocab, width) / width**0.5, requires_grad=False)
        self.lora_A = nn.ParameterList(torch.randn(rank, width) for _ in range(2))
        self.lora_B = nn.ParameterList(torch.zeros(width, rank) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        steps = torch.arange(1, ids.shape[1] + 1)[:, None]
        hidden = self.embed[ids].cumsum(1) / steps  # position t sees what came before
        for base, a, b in zip(self.base, self.lora_A, self.lora_B, strict=True):
            hidden = hidden + torch.tanh(hidden @ (base + b @ a).T)
        return hidden @ self.head.T


class Setup:
    """A model, a batch of S sequences and its log-probabilities as a function of the adapter."""

    def __init__(self, dtype: torch.dtype, fresh: bool, s: int = 8, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = TinyLM().to(dtype)
        if not fresh:  # an adapter in production: B is no longer 0
            for b in self.model.lora_B:
                nn.init.normal_(b, std=0.2)
        self.ids = torch.randint(13, (s, 7))
        self.mask = torch.arange(6) < torch.randint(1, 7, (s, 1))
        named = self.model.named_parameters()
        self.params = {name: p for name, p in named if p.requires_grad}

    def logps(self, params: dict[str, Tensor], rows: slice | Tensor = slice(None)) -> Tensor:
        logits = torch.func.functional_call(self.model, params, (self.ids[rows],))
        return sequence_logps(logits[:, :-1], self.ids[rows, 1:], self.mask[rows])

    def direction(self) -> dict[str, Tensor]:
        logps = self.logps(self.params)
        half = len(logps) // 2
        return gold_gradient(gold_objective(logps[:half], logps[half:], BETA), self.params)
