"""RTSTRUCT -> boolean masks.

A voxel belongs to a structure when its centre lies inside an odd number of the slice's contours (even-odd rule), so
nested contours and key-holes are holes. Contours find their slice by position along the normal, not by the image UIDs
they may or may not name (PS3.3 C.8.8.6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from custom.case import CaseError, Grid
from custom.io.dataset import read_dataset, reading

__all__ = ["RTSTRUCT_SOP_CLASS", "Roi", "StructureSet", "rasterise", "rasterise_finely", "read_rtstruct",
           "rt_utils_mask"]

RTSTRUCT_SOP_CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
CONTOUR_DATA = 0x30060050
CLOSED_TYPES = {"CLOSED_PLANAR", "CLOSEDPLANAR", "CLOSEDPLANAR_XOR", ""}
OFF_PLANE_SLICES = 0.3
LOST_SHARE = 0.001
FINE_BELOW_CC, FINE_MM = 15.0, 0.25
FARTHEST_MM = 1e5
CROSSINGS_AT_ONCE = 2**21


@dataclass(frozen=True)
class Roi:
    """One structure as the file has it.

    Args:
        number: ROINumber.
        name: ROIName.
        kind: RTROIInterpretedType, upper case, often empty.
        contours: closed contours, each ``(n, 3)`` LPS mm with n >= 3.
    """

    number: int
    name: str
    kind: str
    contours: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class StructureSet:
    """The structures of one RTSTRUCT and what it refers to."""

    path: Path
    dataset: Dataset
    rois: tuple[Roi, ...]
    notes: list[str] = field(default_factory=list)

    @property
    def sop_uid(self) -> str:
        return str(self.dataset.get("SOPInstanceUID", ""))

    @property
    def frame_uids(self) -> set[str]:
        """Frames of reference its contours and images lie in; empty when the file names none."""
        items = [*(self.dataset.get("ReferencedFrameOfReferenceSequence") or []),
                 *(self.dataset.get("StructureSetROISequence") or []), self.dataset]
        keys = ("FrameOfReferenceUID", "ReferencedFrameOfReferenceUID")
        return {str(item.get(key)) for item in items for key in keys if item.get(key)}

    @property
    def series_uids(self) -> set[str]:
        """Image series it was drawn on; empty when the file names none."""
        return {
            str(series.SeriesInstanceUID)
            for frame in self.dataset.get("ReferencedFrameOfReferenceSequence") or []
            for study in frame.get("RTReferencedStudySequence") or []
            for series in study.get("RTReferencedSeriesSequence") or []
            if series.get("SeriesInstanceUID")
        }


def read_rtstruct(path: str | Path) -> StructureSet:
    """Read the contours of every ROI.

    Raises:
        CaseError: for a file that is no RTSTRUCT or whose contour data are not triplets of numbers.
    """
    path = Path(path)
    dataset = read_dataset(path)
    with reading(path):
        return _structures(path, dataset)


def _structures(path: Path, dataset: Dataset) -> StructureSet:
    if dataset.get("SOPClassUID") != RTSTRUCT_SOP_CLASS:
        raise CaseError(f"{path}: SOP class {dataset.get('SOPClassUID')}; expected RT Structure Set")
    kinds = {int(o.ReferencedROINumber): str(o.get("RTROIInterpretedType") or "").upper()
             for o in dataset.get("RTROIObservationsSequence") or [] if o.get("ReferencedROINumber") is not None}
    shapes = {int(c.ReferencedROINumber): c.get("ContourSequence") or []
              for c in dataset.get("ROIContourSequence") or [] if c.get("ReferencedROINumber") is not None}
    notes: list[str] = []
    rois = []
    for item in dataset.get("StructureSetROISequence") or []:
        number, name = int(item.ROINumber), str(item.get("ROIName") or f"ROI {item.ROINumber}").strip()
        rois.append(Roi(number, name, kinds.get(number, ""), _closed_contours(shapes.get(number, []), path, name)))
    empty = [r.name for r in rois if not r.contours]
    if empty:
        notes.append(f"ROIs without a closed contour, taken as absent: {', '.join(empty)}")
    numbers_of: dict[str, list[str]] = {}
    for roi in (r for r in rois if r.contours):
        numbers_of.setdefault(roi.name, []).append(str(roi.number))
    notes += [f"several ROIs are called {name!r} (ROI numbers {', '.join(found)}); the first is used"
              for name, found in numbers_of.items() if len(found) > 1]
    return StructureSet(path, dataset, tuple(rois), notes)


def _closed_contours(sequence, path: Path, name: str) -> tuple[np.ndarray, ...]:
    """All but points, open lines and contours of fewer than three points."""
    contours = []
    for contour in sequence:
        kind = str(contour.get("ContourGeometricType") or "").upper()
        try:
            points = _triplets(contour.get_item(CONTOUR_DATA)) if CONTOUR_DATA in contour else np.zeros((0, 3))
        except (TypeError, ValueError) as error:
            raise CaseError(f"{path}: ROI {name!r} has contour data that are no x, y, z triplets ({error})") from error
        if not np.isfinite(points).all() or (points.size and np.abs(points).max() > FARTHEST_MM):
            raise CaseError(f"{path}: ROI {name!r} has contour points that are not finite or beyond {FARTHEST_MM:g} "
                            "mm; delete the ROI or export it anew")
        if kind in CLOSED_TYPES and len(points) >= 3:
            contours.append(points)
    return tuple(contours)


def _triplets(element) -> np.ndarray:
    """``(n, 3)``; the bytes are parsed at once, since pydicom's decimal strings take seconds for a million values."""
    value = element.value
    words = value.decode("ascii").strip(" \0").split("\\") if isinstance(value, bytes) else value
    numbers = [] if words is None or words == [""] else words
    return np.array(numbers, dtype=np.float64).reshape(-1, 3)


def rasterise(roi: Roi, grid: Grid, notes: list[str] | None = None, max_lost: float = 1.0) -> np.ndarray:
    """Voxels whose centre lies inside the ROI.

    Args:
        roi: the contours; a contour fills the slice nearest to it.
        grid: any orientation; ``k`` is the slice axis.
        notes: contours outside the image or between slices are reported here.
        max_lost: share of its volume outside the image beyond which the ROI is refused, as for a target.

    Returns:
        boolean ``grid.shape``.

    Raises:
        CaseError: when the ROI has contours but no voxel, or contours that do not lie in the slices.
    """
    notes = [] if notes is None else notes
    mask = np.zeros(grid.shape, dtype=bool)
    points, slices = _by_slice(roi, [grid.to_index(c) for c in roi.contours], notes)
    inside = (slices >= 0) & (slices < grid.shape[2])
    total = sum(abs(_area(p)) for p in points)
    lost = sum(_area_outside(p, grid.shape) if ok else abs(_area(p)) for p, ok in zip(points, inside))
    if total > 0 and lost / total > max_lost:
        raise CaseError(f"ROI {roi.name!r}: {100 * lost / total:.1f} % of its volume lies outside the CT; expected at "
                        f"most {100 * max_lost:g} % of a target. Add the missing slices, or the CT it was drawn on")
    if total > 0 and lost / total > LOST_SHARE:
        notes.append(f"{roi.name}: {100 * lost / total:.1f} % of its volume lies outside the image, cut off")
    points, slices = [p for p, ok in zip(points, inside) if ok], slices[inside]
    if len(points):
        low, high = slices.min(), slices.max() + 1
        ij = np.concatenate([p[:, :2] for p in points])
        i0, j0 = np.clip(np.floor(ij.min(0)).astype(int), 0, np.array(grid.shape[:2]) - 1)
        i1, j1 = np.clip(np.ceil(ij.max(0)).astype(int) + 1, 1, grid.shape[:2])
        shape = (max(i1 - i0, 1), max(j1 - j0, 1), high - low)
        box = _even_odd([p[:, :2] - (i0, j0) for p in points], slices - low, shape)
        mask[i0:i0 + shape[0], j0:j0 + shape[1], low:high] = box
    if roi.contours and not mask.any():
        raise CaseError(f"ROI {roi.name!r} has {len(roi.contours)} contours but no voxel of the image lies inside: "
                        "the structure set belongs to another image, or the ROI is smaller than a voxel")
    return mask


def rasterise_finely(roi: Roi, grid: Grid, mask: np.ndarray) -> tuple[Grid, np.ndarray] | None:
    """A small ROI on in-plane pixels of at most a quarter millimetre, for dose-volume figures with parts of voxels.

    Args:
        roi: the contours.
        grid: the CT's.
        mask: :func:`rasterise`'s.

    Returns:
        The finer grid, which has the CT's slices, and the mask on it; None for ROIs so large that whole voxels do.
    """
    if np.count_nonzero(mask) * grid.voxel_cc > FINE_BELOW_CC:
        return None
    where = np.argwhere(mask)
    low, high = np.maximum(where.min(0) - (1, 1, 0), 0), np.minimum(where.max(0) + (2, 2, 1), grid.shape)
    factor = np.ceil(grid.spacing_mm / FINE_MM - 1e-6).astype(int)
    factor[2] = 1
    affine = grid.affine.copy()
    affine[:3, 3] = grid.to_world(low + 0.5 / factor - 0.5)
    affine[:3, :3] /= factor
    fine = Grid(tuple((high - low) * factor), affine)
    return fine, rasterise(roi, fine, [])


def _by_slice(roi: Roi, contours: Sequence[np.ndarray], notes: list[str]) -> tuple[list[np.ndarray], np.ndarray]:
    """In-plane contours and their slice; of several contour planes nearest to one slice the closest is kept."""
    if not contours:
        return [], np.zeros(0, dtype=int)
    depth = np.array([c[:, 2].mean() for c in contours])
    bent = max(float(np.ptp(c[:, 2])) for c in contours)
    if bent > 1.0:
        raise CaseError(f"ROI {roi.name!r}: a contour spans {bent:.1f} slices; expected contours that lie in the "
                        "slices of the CT (it was drawn on another orientation)")
    slices = np.floor(depth + 0.5 + 1e-6).astype(int)  # all planes midway between slices go the same way
    off = np.abs(depth - slices)
    keep = np.ones(len(contours), dtype=bool)
    for k in np.unique(slices):
        here = np.flatnonzero(slices == k)
        nearest = depth[here[off[here].argmin()]]
        keep[here] = np.abs(depth[here] - nearest) < 0.1
    if not keep.all():
        notes.append(f"{roi.name}: {int((~keep).sum())} contours lie between the CT slices, the nearest plane is used")
    elif off.max() > OFF_PLANE_SLICES:
        notes.append(f"{roi.name}: contours lie up to {off.max():.2f} slice distances off the CT slices")
    steps = np.diff(np.unique(slices))
    if steps.size and steps.min() > 1:
        notes.append(f"{roi.name}: drawn on one slice in {steps.min()} only, the slices between stay empty")
    return [c for c, ok in zip(contours, keep) if ok], slices[keep]


def _even_odd(polygons: Sequence[np.ndarray], slices: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Even-odd fill of polygons at pixel centres.

    Every edge crosses the pixel rows ``j`` in the half-open span of its ends; all pixels from the crossing on are
    toggled, and the parity of the toggles along ``i`` says what is inside.

    Args:
        polygons: each ``(n, 2)`` in ``(i, j)`` index units.
        slices: slice of each polygon.
        shape: ``(ni, nj, nk)`` of the box to fill.

    Returns:
        boolean ``shape``.
    """
    start = np.concatenate(polygons)
    end = np.concatenate([np.roll(p, -1, axis=0) for p in polygons])
    k = np.repeat(slices, [len(p) for p in polygons])
    first = np.ceil(np.minimum(start[:, 1], end[:, 1])).clip(0, shape[1]).astype(int)
    stop = np.ceil(np.maximum(start[:, 1], end[:, 1])).clip(0, shape[1]).astype(int)
    count = stop - first
    flips = np.zeros((shape[0] + 1, shape[1], shape[2]), dtype=np.uint8)
    batch = np.cumsum(count) // CROSSINGS_AT_ONCE  # bounds the memory of contours with very many points
    for edges in np.split(np.arange(len(start)), np.flatnonzero(np.diff(batch)) + 1):
        n = count[edges]
        edge = np.repeat(edges, n)
        j = first[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(n) - n, n)
        (i_a, j_a), (i_b, j_b) = start[edge].T, end[edge].T
        crossing = i_a + (j - j_a) * (i_b - i_a) / np.where(j_b == j_a, 1.0, j_b - j_a)
        i = np.ceil(crossing).clip(0, shape[0]).astype(int)
        np.bitwise_xor.at(flips, (i, j, k[edge]), np.uint8(1))
    return np.bitwise_xor.accumulate(flips[:-1], axis=0).astype(bool)


def _area(points: np.ndarray) -> float:
    """Signed polygon area in pixels."""
    i, j = points[:, 0], points[:, 1]
    return 0.5 * float(np.sum(i * np.roll(j, -1) - j * np.roll(i, -1)))


def _area_outside(points: np.ndarray, shape: tuple[int, int, int]) -> float:
    """Pixels of a polygon's area beyond the image edge."""
    limit = np.array(shape[:2]) - 0.5
    if (points[:, :2] >= -0.5).all() and (points[:, :2] <= limit).all():
        return 0.0
    return max(0.0, abs(_area(points)) - abs(_area(np.clip(points[:, :2], -0.5, limit))))


def rt_utils_mask(structures: StructureSet, roi: Roi, ct_files: Sequence[Path], grid: Grid) -> np.ndarray:
    """The mask as rt-utils draws it: contour pixels included, about half a pixel larger than :func:`rasterise`.

    Args:
        structures: the RTSTRUCT.
        roi: one of its ROIs.
        ct_files: the slices in the order of ``k``.
        grid: grid of the slices.

    Raises:
        CaseError: where rt-utils is known to be wrong (non-square or anisotropic pixels) or fails.
    """
    from rt_utils.rtstruct import RTStruct  # heavy (OpenCV); only wanted for this engine

    if grid.shape[0] != grid.shape[1] or abs(grid.spacing_mm[0] - grid.spacing_mm[1]) > 1e-4:
        raise CaseError(f"mask_engine 'rt_utils' needs square images with square pixels, found {grid.shape[:2]} of "
                        f"{grid.spacing_mm[:2]} mm; use mask_engine 'exact'")
    series = [pydicom.dcmread(p, stop_before_pixels=True, force=True) for p in ct_files]
    try:
        mask = RTStruct(series, structures.dataset).get_roi_mask_by_name(roi.name)
    except Exception as error:  # rt-utils raises AttributeError, KeyError and bare Exception on files it cannot follow
        raise CaseError(f"{structures.path}: rt-utils cannot read ROI {roi.name!r} ({error}); "
                        "use mask_engine 'exact'") from error
    return np.ascontiguousarray(mask.astype(bool).transpose(1, 0, 2))
