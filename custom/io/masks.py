"""Masks of a case that each take the memory of their own box only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from custom.case import CaseError

__all__ = ["BoxedMasks"]


class BoxedMasks(Mapping):
    """Name -> boolean ``[i, j, k]``, unfolded when it is asked for.

    Forty structures on 512 x 512 x 400 voxels would fill 4 GB as whole arrays; their boxes take a tenth of that.
    Every access gives a new array, so that nobody's change is another's.

    Args:
        shape: of every mask.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = tuple(shape)
        self._boxes: dict[str, tuple[tuple[slice, ...], np.ndarray]] = {}

    def add(self, name: str, mask: np.ndarray) -> None:
        """Keep a mask.

        Raises:
            CaseError: for an array of another shape.
        """
        if mask.shape != self.shape:
            raise CaseError(f"mask {name!r} has the shape {mask.shape}; expected {self.shape}")
        box = tuple(_span(mask.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3))
        self._boxes[name] = box, mask[box].copy()

    def __getitem__(self, name: str) -> np.ndarray:
        box, inside = self._boxes[name]
        mask = np.zeros(self.shape, dtype=bool)
        mask[box] = inside
        return mask

    def __contains__(self, name: object) -> bool:
        return name in self._boxes

    def __iter__(self) -> Iterator[str]:
        return iter(self._boxes)

    def __len__(self) -> int:
        return len(self._boxes)


def _span(line: np.ndarray) -> slice:
    """From the first to the last True."""
    found = np.flatnonzero(line)
    return slice(int(found[0]), int(found[-1]) + 1) if found.size else slice(0, 0)
