"""Beam paths: what the beams would give through apertures that just show the target."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from custom.physics.fluence import BeamModel

__all__ = ["open_field_dose"]


def open_field_dose(beams: BeamModel, targets: list[np.ndarray]) -> list[np.ndarray]:
    """Dose of uniform fluence through conformal apertures, summed over the beams.

    Attenuation, divergence and penumbra come from the pencil-beam engine, so that a voxel's value tells how much the
    beams on their way to the target must pass through it.

    Args:
        beams: the case's beam model.
        targets: boolean masks ``[i, j, k]``, one aperture set each, all inside the union of the case's targets.

    Returns:
        for each target a float32 array with mean 1 inside that target, zero outside the body.
    """
    out = []
    for target in targets:
        doses = (f.forward(_aperture(d, target)) for d, f in zip(beams.directions, beams.fields, strict=True))
        volume = beams.volume(sum(doses))
        inside = volume[target & beams.case.body]
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
