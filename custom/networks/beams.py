"""Corrections beam by beam: the plan prior's dose of each beam, more or less of it.

Teng et al. (Med Image Anal 92, 2024) compose the dose of the beams. Here the plan prior has them already, and what a
network says of each is how much of it the reference has more, in each voxel: what differs between two planners is first
of all how much each beam carries, and then which of its rays.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["beam_channels", "corrected_beams"]

PREFIX = "plan_beam_"
WEIGHT = 3.0  # a beam has about a ninth of the dose: so an output changes it as fast as one that is added


def beam_channels(names: Sequence[str]) -> list[int]:
    """Which of the spatial channels are doses of single beams."""
    return [i for i, name in enumerate(names) if name.startswith(PREFIX)]


def corrected_beams(output: Tensor, doses: Tensor, dim: int) -> Tensor:
    """Sum over the beams, along ``dim``, of what a network adds to each; ``output`` and ``doses`` alike in shape."""
    return WEIGHT * (output * doses).sum(dim)
