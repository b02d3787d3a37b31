"""Rows sorted by expert, as the layer passes them, and the parts of them that a worker gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from torch import Tensor

from moa_ray.moe.remote.transport import raw


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one call.

    Attributes:
        parts: Tensors of equal shape (R, D) whose rows belong together.
        of: Rows of each expert that has any.
        ends: Where each expert's rows end.
        shares: Of calls put together, the rows of every expert that are each call's own; () for one call.
    """

    parts: tuple[Tensor, ...]
    of: dict[int, int]
    ends: list[int]
    shares: Sequence[Sequence[int]] = ()

    @classmethod
    def sort(cls, counts_E: Tensor, *parts: Tensor, shares_CE: Tensor | None = None) -> Rows:
        """From the counts of all experts, and of each call where several were put together."""
        counts = counts_E.tolist()
        return cls(
            tuple(part.detach().cpu().contiguous() for part in parts),
            {expert: count for expert, count in enumerate(counts) if count},
            counts_E.cumsum(0).tolist(),
            () if shares_CE is None else shares_CE.tolist(),
        )

    def views(self, experts: Sequence[int], parts: Sequence[Tensor] | None = None) -> list[memoryview]:
        """The memory of some experts' rows, part by part; of these parts or of other tensors of the shape."""
        stretches = self._stretches(experts)
        return [raw(part[begin:end]) for part in (parts or self.parts) for begin, end in stretches]

    def header(self, experts: Sequence[int]) -> dict[str, Any]:
        """Names the rows of some experts, ascending."""
        named: dict[str, Any] = {"experts": list(experts), "rows": [self.of[expert] for expert in experts]}
        if self.shares:
            named["shares"] = [[share[expert] for expert in experts] for share in self.shares]
        return named

    def digest(self, expert: int) -> bytes:
        """A fingerprint of one expert's rows."""
        digest = blake2b(digest_size=16)
        for view in self.views([expert]):
            digest.update(view)
        return digest.digest()

    def _stretches(self, experts: Sequence[int]) -> list[tuple[int, int]]:
        """(first row, row after the last) of the experts' rows, neighbours joined."""
        found: list[tuple[int, int]] = []
        for expert in experts:
            begin, end = self.ends[expert] - self.of[expert], self.ends[expert]
            if found and found[-1][1] == begin:
                found[-1] = (found[-1][0], end)
            else:
                found.append((begin, end))
        return found


class Suspects:
    """Rows that were with workers when they died; what was there twice is not sent a third time."""

    _KEPT = 64

    def __init__(self) -> None:
        self._deaths: dict[tuple[int, int, bytes], int] = {}

    def blame(self, rows: Rows, experts: Sequence[int]) -> None:
        """Some experts' rows were with a worker that died."""
        for expert in experts:
            key = (expert, rows.of[expert], rows.digest(expert))
            self._deaths[key] = self._deaths.pop(key, 0) + 1
        for old in list(self._deaths)[: -self._KEPT]:
            del self._deaths[old]

    def acquit(self, rows: Rows) -> None:
        """These rows were answered."""
        if self._deaths:
            for expert in self._known(rows):
                self._deaths.pop((expert, rows.of[expert], rows.digest(expert)), None)

    def poisoned(self, rows: Rows, deaths: int = 2) -> list[int]:
        """Experts whose rows were with so many workers that died, and must not be sent again."""
        return [
            expert
            for expert in self._known(rows)
            if self._deaths.get((expert, rows.of[expert], rows.digest(expert)), 0) >= deaths
        ]

    def _known(self, rows: Rows) -> list[int]:
        """Hashing is left to rows that look like a suspect."""
        lengths = {(expert, count) for expert, count, _ in self._deaths}
        return [expert for expert, count in rows.of.items() if (expert, count) in lengths]
