"""Workers that hold a share of one model's weights each, and so have to go through every pass together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Team:
    """This worker's place among those of its model; alone by itself."""

    rank: int = 0
    workers: int = 1

    @classmethod
    def here(cls) -> Team:
        """Return the place in torch.distributed's group."""
        from torch import distributed

        return cls(distributed.get_rank(), distributed.get_world_size())

    def share(self, parts: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """Yield this worker's parts in turn, as many on each worker, and whether they count.

        Where the last round has none left for it, a worker takes one that another has: the others need
        it in the pass, and its result is left out.
        """
        for first in range(0, len(parts), self.workers):
            at = first + self.rank
            yield parts[at if at < len(parts) else first], at < len(parts)

    def summed(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Return the sums over all workers of tensors that each of them has by the same names."""
        if self.workers > 1:
            from torch import distributed

            for tensor in tensors.values():
                distributed.all_reduce(tensor)
        return tensors

    def together(self, found: dict[int, T]) -> dict[int, T]:
        """Return what all workers found; each of them has its own places."""
        if self.workers == 1:
            return found
        from torch import distributed

        every: list[Any] = [None] * self.workers
        distributed.all_gather_object(every, found)
        return {place: value for each in every for place, value in each.items()}


ALONE = Team()
"""A worker that has the whole model."""
