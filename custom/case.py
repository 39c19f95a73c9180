"""The records every room speaks: where voxels lie, which beams, one patient's case, and the dose scale.

Conventions, everywhere outside ``io``:

* Arrays are indexed ``[i, j, k]``; :class:`Grid` maps indices to DICOM patient coordinates (LPS, mm).
* Doses are in Gy (physical dose of the whole course), angles in degrees (IEC 61217), densities relative to water.
* Structures carry their TG-263 name; the external contour is ``"Body"``, targets keep their prescription in
  :attr:`Case.prescription_gy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from scipy import ndimage

__all__ = [
    "BODY", "Beam", "Case", "CaseError", "DoseScale", "Grid", "Keys", "OutputError", "Site", "Technique", "resample",
]

BODY = "Body"
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


class CaseError(ValueError):
    """Input that cannot be used: the message says what was found, what was expected and what to do."""


class OutputError(CaseError):
    """Results that cannot be written, a full disk or a folder without the right to write: no case can be done."""


class Keys:
    """Names of the entries of a data dictionary, shared by transforms, configs and engines."""

    IMAGE = "image"
    LABEL = "label"
    PRED = "pred"
    BODY = "body"
    STD = "pred_std"
    CASE = "case"
    ROIS = "rois"


class Technique:
    """Delivery technique (RTPLAN beams: fixed gantry or moving gantry)."""

    IMRT = "IMRT"
    VMAT = "VMAT"


class Site:
    """Body site of a case."""

    HEAD_NECK = "HeadNeck"
    LUNG = "Lung"


@dataclass(frozen=True)
class Grid:
    """A regular voxel grid in DICOM patient coordinates.

    Args:
        shape: voxels along ``(i, j, k)``.
        affine: ``(4, 4)``; ``affine @ (i, j, k, 1)`` is the voxel centre in LPS mm (PS3.3 C.7.6.2.1.1).
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    def __post_init__(self) -> None:
        affine = np.asarray(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise CaseError(f"grid: expected an invertible, finite 4x4 affine, found\n{affine}")
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))

    @classmethod
    def axis_aligned(cls, shape, spacing_mm, origin_mm=(0.0, 0.0, 0.0)) -> Grid:
        """Grid whose axes run along patient left, posterior and superior."""
        affine = np.diag([*map(float, spacing_mm), 1.0])
        affine[:3, 3] = origin_mm
        return cls(tuple(shape), affine)

    @property
    def spacing_mm(self) -> np.ndarray:
        """Distance between voxel centres along ``(i, j, k)``."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def origin_mm(self) -> np.ndarray:
        """LPS position of voxel ``(0, 0, 0)``."""
        return self.affine[:3, 3].copy()

    @property
    def voxel_cc(self) -> float:
        """Volume of one voxel in cm^3."""
        return float(abs(np.linalg.det(self.affine[:3, :3])) / 1000.0)

    @property
    def is_axis_aligned(self) -> bool:
        """True when the axes run exactly along +L, +P, +S, as the physics and the networks want them."""
        return bool(np.allclose(self.affine[:3, :3], np.diag(self.spacing_mm), atol=1e-4))

    @property
    def ras_affine(self) -> np.ndarray:
        """The same map into RAS mm, as NIfTI and MONAI's MetaTensor keep it."""
        return LPS_TO_RAS @ self.affine

    def to_world(self, index: np.ndarray) -> np.ndarray:
        """LPS mm of voxel indices; ``index`` has shape ``(..., 3)``."""
        return np.asarray(index, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def to_index(self, point_mm: np.ndarray) -> np.ndarray:
        """Fractional voxel indices of LPS points of shape ``(..., 3)``."""
        return (np.asarray(point_mm, dtype=np.float64) - self.affine[:3, 3]) @ np.linalg.inv(self.affine[:3, :3]).T

    def axes_mm(self) -> list[np.ndarray]:
        """Voxel-centre coordinates along each axis of an axis-aligned grid."""
        if not self.is_axis_aligned:
            raise CaseError(f"grid: axes_mm wants an axis-aligned LPS grid, found the affine\n{self.affine}")
        return [self.origin_mm[a] + self.spacing_mm[a] * np.arange(self.shape[a]) for a in range(3)]

    def crop(self, slices: tuple[slice, slice, slice]) -> Grid:
        """Grid of ``array[slices]`` (unit steps)."""
        start = np.array([s.start or 0 for s in slices])
        stop = [n if s.stop is None else s.stop for s, n in zip(slices, self.shape)]
        affine = self.affine.copy()
        affine[:3, 3] = self.to_world(start)
        return Grid(tuple(int(b - a) for a, b in zip(start, stop)), affine)

    def same_as(self, other: Grid, tolerance_mm: float = 1e-3) -> bool:
        """True when both grids have the same voxels."""
        return self.shape == other.shape and bool(np.allclose(self.affine, other.affine, atol=tolerance_mm))


@dataclass(frozen=True)
class Beam:
    """One treatment beam.

    Args:
        name: beam name of the plan, or of the default that made it.
        gantry_deg: IEC gantry angles in the frame of a head-first-supine patient (0 = from anterior, 90 = from the
            patient's left). One angle for a fixed field, the sampled angles for an arc.
        isocenter_mm: LPS position.
    """

    name: str
    gantry_deg: tuple[float, ...]
    isocenter_mm: tuple[float, float, float]

    @property
    def is_arc(self) -> bool:
        return len(self.gantry_deg) > 1


@dataclass(frozen=True)
class Case:
    """One patient, in any of the input formats.

    Args:
        name: file-system-safe name of the case; results go to ``<output_dir>/<name>/``.
        grid: grid of every array below.
        ct_hu: Hounsfield units ``[i, j, k]``, or None when the case comes without a CT.
        masks: TG-263 name -> boolean ``[i, j, k]``. ``Body`` is always there; absent organs are absent keys.
        prescription_gy: target name -> prescribed dose; every key is in ``masks``.
        beams: at least one.
        technique: :class:`Technique`.
        site: :class:`Site`.
        dose_gy: reference dose ``[i, j, k]`` where one came along.
        dose_grid: the grid the reference dose was stored on, for writing on "the plan's grid".
        source: what the reader wants the writers and the report to know. Keys: ``format`` ("dicom", "openkbp",
            "gdp_hmm"), ``path``, ``notes`` (list of str, shown to the user: unrecognised ROIs, defaults taken, ...),
            and for DICOM ``references`` (see ``custom.io.dicom_folder``).
    """

    name: str
    grid: Grid
    ct_hu: np.ndarray | None
    masks: Mapping[str, np.ndarray]
    prescription_gy: Mapping[str, float]
    beams: tuple[Beam, ...]
    technique: str
    site: str
    dose_gy: np.ndarray | None = None
    dose_grid: Grid | None = None
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if BODY not in self.masks:
            raise CaseError(f"case {self.name}: no '{BODY}' mask; found {sorted(self.masks)}")
        if not self.prescription_gy:
            raise CaseError(f"case {self.name}: no prescription; found the structures {sorted(self.masks)}")
        for roi, gy in self.prescription_gy.items():
            if roi not in self.masks:
                raise CaseError(f"case {self.name}: prescription for {roi!r}, which is not among {sorted(self.masks)}")
            if not 0 < gy < 200:
                raise CaseError(f"case {self.name}: prescription of {roi!r} is {gy:g} Gy; expected 0 to 200 Gy")
        for key, array in chain(self.masks.items(), (("ct", self.ct_hu), ("dose", self.dose_gy))):
            if array is not None and array.shape != self.grid.shape:
                raise CaseError(f"case {self.name}: {key} has shape {array.shape}, the grid {self.grid.shape}")
        if not self.beams:
            raise CaseError(f"case {self.name}: no beams; give them in an RTPLAN or name a default")

    @property
    def body(self) -> np.ndarray:
        return self.masks[BODY]

    @property
    def targets(self) -> dict[str, float]:
        """Targets by falling prescription."""
        return dict(sorted(self.prescription_gy.items(), key=lambda item: -item[1]))

    @property
    def highest_prescription_gy(self) -> float:
        return max(self.prescription_gy.values())

    def target_mask(self) -> np.ndarray:
        """Union of all targets."""
        return np.logical_or.reduce([self.masks[roi] for roi in self.prescription_gy])


@dataclass(frozen=True)
class DoseScale:
    """The single crossing between Gy and the networks' unit, a fraction of the highest prescription."""

    prescription_gy: float

    def to_network(self, dose_gy):
        return dose_gy / self.prescription_gy

    def to_gy(self, fraction):
        return fraction * self.prescription_gy


def resample(array: np.ndarray, source: Grid, target: Grid, order: int = 1, fill: float = 0.0) -> np.ndarray:
    """Sample ``array`` (on ``source``) at the voxel centres of ``target``.

    Grids that differ by a permutation, flips or a whole-voxel shift are copied exactly; others are interpolated by
    splines of the given order, slab by slab, so that memory stays bounded.

    Returns:
        ``target.shape`` array of ``array``'s dtype for order 0, else float32; ``fill`` outside ``source``.
    """
    if array.shape != source.shape:
        raise CaseError(f"resample: the array has shape {array.shape}, its grid {source.shape}")
    to_source = np.linalg.inv(source.affine) @ target.affine
    exact = _copy_exactly(array, to_source, target.shape, fill)
    if exact is not None:
        return exact if order == 0 else exact.astype(np.float32, copy=False)
    # map_coordinates fades towards `fill` within half a voxel of the edge; nearest edge plus an inside test does not.
    out = np.empty(target.shape, dtype=array.dtype if order == 0 else np.float32)
    data = array if order == 0 else array.astype(np.float32, copy=False)
    limit = np.array(source.shape)[:, None] - 0.5
    plane = np.stack(np.meshgrid(*map(np.arange, target.shape[1:]), indexing="ij")).reshape(2, -1)
    for i in range(target.shape[0]):
        index = np.vstack([np.full(plane.shape[1], i), plane])
        point = to_source[:3, :3] @ index + to_source[:3, 3:]
        value = ndimage.map_coordinates(data, point, order=order, mode="nearest", prefilter=order > 1)
        inside = ((point > -0.5 - 1e-6) & (point < limit + 1e-6)).all(axis=0)
        out[i] = np.where(inside, value, fill).reshape(target.shape[1:])
    return out


def _copy_exactly(array: np.ndarray, to_source: np.ndarray, shape: tuple, fill: float) -> np.ndarray | None:
    """The resampled array where every target voxel centre is a source voxel centre, else None."""
    matrix, offset = to_source[:3, :3], to_source[:3, 3]
    whole = np.rint(matrix)
    if not (np.abs(matrix - whole) < 1e-6).all() or not (np.abs(whole).sum(0) == 1).all():
        return None
    if not (np.abs(whole).sum(1) == 1).all() or not (np.abs(offset - np.rint(offset)) < 1e-3).all():
        return None
    axes = [int(np.flatnonzero(whole[:, a])[0]) for a in range(3)]  # source axis of each target axis
    out = np.full(shape, fill, dtype=array.dtype)
    source_slices: list[slice] = [slice(0)] * 3
    target_slices: list[slice] = []
    for a, s in enumerate(axes):
        sign, start = int(whole[s, a]), int(np.rint(offset[s]))
        position = start + sign * np.arange(shape[a])
        ok = np.flatnonzero((position >= 0) & (position < array.shape[s]))
        if ok.size == 0:
            return out
        target_slices.append(slice(ok[0], ok[-1] + 1))
        first, last = position[ok[0]], position[ok[-1]]
        source_slices[s] = slice(first, last + 1) if sign > 0 else slice(first, last - 1 if last > 0 else None, -1)
    out[tuple(target_slices)] = array[tuple(source_slices)].transpose(axes)
    return out
