"""One CT series -> Hounsfield units on a checked grid.

Geometry follows PS3.3 C.7.6.2.1.1: ``i`` runs along a row (increasing column index), ``j`` down a column, ``k`` along
the slice normal ``row x column``. Only ImagePositionPatient and ImageOrientationPatient make the geometry, never
SliceLocation, InstanceNumber or PatientPosition, so every orientation is read alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from custom.case import CaseError, Grid
from custom.io.dataset import check_bounds, numbers, read_dataset, reading

__all__ = ["CT_SOP_CLASS", "ENHANCED_CT_SOP_CLASS", "CtSeries", "check_geometry", "read_ct"]

CT_SOP_CLASS, ENHANCED_CT_SOP_CLASS = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1"
HU_RANGE = (-1024, 3071)
GAP_FACTOR = 1.5
UNEVEN_SHARE, UNEVEN_MM = 0.01, 0.1
MAX_TILT_DEG = 0.5
PLAUSIBLE_AIR_HU = -900
PIXEL_MM = (0.05, 20.0)


@dataclass(frozen=True)
class CtSeries:
    """A CT volume.

    Args:
        hu: float32 ``[i, j, k]``, clipped to -1024..3071 HU.
        grid: DICOM geometry.
        header: dataset of the first slice, without pixels.
        files: files in the order of ``k``.
        sop_uids: SOPInstanceUID of each slice, in the order of ``k``.
        notes: what the user should know.
    """

    hu: np.ndarray
    grid: Grid
    header: Dataset
    files: tuple[Path, ...]
    sop_uids: tuple[str, ...]
    notes: list[str] = field(default_factory=list)


def read_ct(files: Sequence[Path]) -> CtSeries:
    """Read one series, sorted along its normal and checked.

    Raises:
        CaseError: for missing or contradicting slices, a tilted gantry, or pixels that cannot be decoded.
    """
    with reading(Path(files[0]).parent):
        return _read_series(files)


def _read_series(files: Sequence[Path]) -> CtSeries:
    notes: list[str] = []
    slices = [(read_dataset(p, stop_before_pixels=True), Path(p)) for p in sorted(files)]
    slices = _drop_localizers(slices, notes)
    _check_kind(slices)
    grid, order = check_geometry(slices, notes)
    slices = [slices[i] for i in order]
    hu = np.empty(grid.shape[::-1], dtype=np.float32)
    for k, (_, path) in enumerate(slices):
        _read_slice(path, hu[k])
    if any(_rescale(header) is None for header, _ in slices):
        if hu.min() > PLAUSIBLE_AIR_HU:
            raise CaseError(f"{slices[0][1]}: no RescaleSlope/Intercept, and the smallest value is {hu.min():g}; these "
                            "are not Hounsfield units. Export the CT anew with its rescale values")
        notes.append("slices without RescaleSlope/Intercept: taken as Hounsfield units")
    np.clip(hu, *HU_RANGE, out=hu)
    header = slices[0][0]
    return CtSeries(np.ascontiguousarray(hu.transpose(2, 1, 0)), grid, header, tuple(p for _, p in slices),
                    tuple(str(h.SOPInstanceUID) for h, _ in slices), notes)


def _drop_localizers(slices: list, notes: list[str]) -> list:
    kept = [(h, p) for h, p in slices if "LOCALIZER" not in [str(t).upper() for t in h.get("ImageType", None) or []]]
    if len(kept) < len(slices):
        notes.append(f"{len(slices) - len(kept)} localizer image(s) left out")
    if not kept:
        raise CaseError(f"{slices[0][1].parent}: only localizer images; expected an axial CT series")
    return kept


def _check_kind(slices: Sequence[tuple[Dataset, Path]]) -> None:
    """One patient, one frame of reference, Hounsfield units and grey values throughout the series."""
    for header, path in slices:
        with reading(path):
            _check_slice(header, path, *slices[0])


def _check_slice(header: Dataset, path: Path, first: Dataset, first_path: Path) -> None:
    for key in ("PatientID", "FrameOfReferenceUID"):
        if str(header.get(key) or "") != str(first.get(key) or ""):
            raise CaseError(f"{path}: another {key} than {first_path.name} of the same series; expected one patient "
                            "and one scan. Export the series anew")
    kind = str(header.get("RescaleType") or "HU").upper()
    if kind not in ("HU", "US"):
        raise CaseError(f"{path}: RescaleType {kind!r}; expected Hounsfield units (HU). Choose the planning CT, not an "
                        "effective-atomic-number or electron-density image")
    photometric = str(header.get("PhotometricInterpretation") or "MONOCHROME2")
    if photometric != "MONOCHROME2" or int(header.get("NumberOfFrames") or 1) != 1:
        raise CaseError(f"{path}: {photometric} with {header.get('NumberOfFrames') or 1} frame(s); expected "
                        "single-frame MONOCHROME2 CT images. Convert them")
    for key in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns"):
        if header.get(key) is None or header.get(key) == "":
            raise CaseError(f"{path}: no {key}; expected a CT slice with its geometry. Export it anew")
    for key, count in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6), ("PixelSpacing", 2)):
        numbers(header, key, count, path)
    if (header.Rows, header.Columns) != (first.Rows, first.Columns):
        raise CaseError(f"{path}: {header.Rows}x{header.Columns} pixels, {first_path.name} has "
                        f"{first.Rows}x{first.Columns}; one series must have one matrix. Remove what does not belong")
    for key in ("ImageOrientationPatient", "PixelSpacing"):
        if not np.allclose(_floats(header, key), _floats(first, key), atol=1e-3):
            raise CaseError(f"{path}: {key} {_floats(header, key)} differs from {_floats(first, key)} of "
                            f"{first_path.name}; keep one orientation in the series")


def check_geometry(slices: Sequence[tuple[Dataset, Path]], notes: list[str]) -> tuple[Grid, list[int]]:
    """Grid of a series and the order of its slices along the normal.

    Args:
        slices: header and file of every slice.
        notes: repeated slices and uneven spacing are reported here.

    Raises:
        CaseError: naming the file or the positions that contradict a regular grid.
    """
    first, first_path = slices[0]
    row, column = _floats(first, "ImageOrientationPatient").reshape(2, 3)
    normal = np.cross(row, column)
    spacing = _floats(first, "PixelSpacing")  # (row, column) spacing: y first (PS3.3 10.7.1.3)
    if abs(np.linalg.norm(row) - 1) > 1e-2 or abs(np.linalg.norm(normal) - 1) > 1e-2:
        raise CaseError(f"{first_path}: ImageOrientationPatient {[*row, *column]}; expected two unit vectors at right "
                        "angles. Export the series anew")
    low, high = PIXEL_MM
    if not (low <= spacing.min() and spacing.max() <= high):
        raise CaseError(f"{first_path}: PixelSpacing {spacing} mm; expected {low:g} to {high:g} mm")
    positions = np.array([_floats(h, "ImagePositionPatient") for h, _ in slices])
    order = _sort_and_drop_repeats(slices, positions @ normal, notes)
    if len(order) < 2:
        raise CaseError(f"{first_path.parent}: {len(order)} CT slice; a volume needs at least two")
    step = _step(positions[order], normal, first_path.parent, notes)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * spacing[1], column * spacing[0], step
    affine[:3, 3] = positions[order[0]]
    shape = (int(first.Columns), int(first.Rows), len(order))
    check_bounds(shape, first_path.parent)
    return Grid(shape, affine), order


def _sort_and_drop_repeats(slices: Sequence, along: np.ndarray, notes: list[str]) -> list[int]:
    order: list[int] = []
    for i in np.argsort(along, kind="stable"):
        if order and abs(along[i] - along[order[-1]]) < 1e-3:
            (a, path_a), (b, path_b) = slices[order[-1]], slices[i]
            same = a.SOPInstanceUID == b.SOPInstanceUID and path_a.read_bytes() == path_b.read_bytes()
            if not same:
                raise CaseError(f"{path_a.name} and {path_b.name}: two different slices at the same position "
                                f"({along[i]:.2f} mm along the normal); delete one of them")
            notes.append(f"{path_b.name}: repeats {path_a.name}, left out")
            continue
        order.append(int(i))
    return order


def _step(positions: np.ndarray, normal: np.ndarray, folder: Path, notes: list[str]) -> np.ndarray:
    """Vector from slice to slice; sorted positions in, checked for gaps, tilt and uneven spacing."""
    along = positions @ normal
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    wide = np.flatnonzero(gaps > GAP_FACTOR * usual)
    if wide.size:
        where = ", ".join(f"{along[i]:.2f} to {along[i + 1]:.2f}" for i in wide[:5])
        raise CaseError(f"{folder}: CT slices are missing between {where} mm (usual distance {usual:.2f} mm); "
                        "export the whole series")
    off = np.abs(gaps - usual).max()
    if off > max(UNEVEN_SHARE * usual, UNEVEN_MM):
        raise CaseError(f"{folder}: slice distances range from {gaps.min():.3f} to {gaps.max():.3f} mm; expected a "
                        "uniform series. Resample the CT to one slice distance")
    if off > 1e-3:
        notes.append(f"slice distances vary by {off:.4f} mm; their mean is used")
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    cosine = float(step @ normal / np.linalg.norm(step))
    tilt_deg = float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
    if tilt_deg > MAX_TILT_DEG:
        raise CaseError(f"{folder}: the slices are sheared by {tilt_deg:.1f} degrees (gantry tilt); expected slice "
                        "positions along the normal. Resample the CT to an untilted grid")
    return normal * float(step @ normal)


def _read_slice(path: Path, out: np.ndarray) -> None:
    """Hounsfield units of one file into ``out`` ``(rows, columns)``."""
    dataset = read_dataset(path)
    try:
        pixels = dataset.pixel_array
    except Exception as error:  # pydicom's decoders raise many kinds; each means that this slice cannot be read
        text = " ".join(str(error).split())[:300]
        raise CaseError(f"{path}: the pixels cannot be decoded ({type(error).__name__}: {text}). Copy the file again, "
                        "or for JPEG compression install python-gdcm, or pylibjpeg and its plugins") from error
    if pixels.shape != out.shape:
        raise CaseError(f"{path}: pixel data of shape {pixels.shape}, the header tells {out.shape}")
    slope, intercept = _rescale(dataset) or (1.0, 0.0)
    if not (np.isfinite([slope, intercept]).all() and slope > 0):
        raise CaseError(f"{path}: RescaleSlope {slope:g}, RescaleIntercept {intercept:g}; expected a positive slope "
                        "and finite numbers. Export the CT anew")
    np.multiply(pixels, np.float32(slope), out=out, casting="unsafe")
    out += np.float32(intercept)


def _rescale(header: Dataset) -> tuple[float, float] | None:
    slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
    if slope in (None, "") or intercept in (None, ""):
        return None
    return float(slope), float(intercept)


def _floats(header: Dataset, key: str) -> np.ndarray:
    return np.array([float(v) for v in header[key].value])
