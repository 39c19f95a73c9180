"""Beam paths: what the beams would give through apertures that just show the target."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from custom.case import Case
from custom.physics.fluence import case_directions

__all__ = ["open_field_dose"]


def open_field_dose(case: Case, targets: list[np.ndarray], *, beamlet_mm: float = 5.0,
                    max_directions: int = 24) -> list[np.ndarray]:
    """Dose of uniform fluence through conformal apertures, summed over the case's beams.

    Attenuation, divergence and penumbra come from the pencil-beam engine, so that a voxel's value tells how much the
    beams on their way to the target must pass through it.

    Args:
        case: on an axis-aligned grid.
        targets: boolean masks ``[i, j, k]``, one aperture set each, all inside the union of the case's targets.

    Returns:
        for each target a float32 array with mean 1 inside that target, zero outside the body.
    """
    index = np.nonzero(case.body)
    doses = np.zeros((len(targets), index[0].size), dtype=np.float32)
    for direction in case_directions(case, beamlet_mm, max_directions):
        field = direction.field(index)
        for dose, target in zip(doses, targets, strict=True):
            dose += field.forward(_aperture(direction, target))
    out = []
    for dose, target in zip(doses, targets, strict=True):
        volume = np.zeros(case.grid.shape, dtype=np.float32)
        volume[index] = dose
        inside = volume[target & case.body]
        out.append(volume / max(float(inside.mean()) if inside.size else 0.0, 1e-6))
    return out


def _aperture(direction, target: np.ndarray) -> np.ndarray:
    """Open beamlets ``(n_u, n_w)`` of the target's projection, small holes from the voxel lattice closed."""
    u, w, _ = direction.beam_eye_view(np.nonzero(target))
    size = direction.beamlet_mm
    row = np.rint((u - direction.u_mm[0]) / size).astype(int).clip(0, direction.u_mm.size - 1)
    column = np.rint((w - direction.w_mm[0]) / size).astype(int).clip(0, direction.w_mm.size - 1)
    shape = direction.active.shape
    open_ = np.zeros(shape, dtype=bool)
    open_[row, column] = True
    return (ndimage.binary_closing(open_) | open_).astype(np.float32)
