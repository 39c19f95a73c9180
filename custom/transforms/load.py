"""From files to a case, and from a case to the grid the network works on."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform
from scipy import ndimage

from custom.case import BODY, Case, Grid, Keys, resample
from custom.io import read_case

__all__ = ["LoadImageRTd", "WorkingGridd", "to_working_grid"]


class LoadImageRTd(MapTransform):
    """Read a case from a DICOM folder, an OpenKBP folder or a GDP-HMM file.

    ``data[key]`` holds the path; the :class:`custom.case.Case` goes to ``data["case"]``. The name holds "LoadImage" so
    that MONAI Deploy, which brings its own loading, leaves it out.

    Args:
        keys: key of the path, ``"image"``.
        prescription_gy: overrides the files: a dict target -> Gy, or one number for the highest target.
        technique, site: override what the files tell.
        roi_map: the user's own ROI name -> TG-263 name, before the alias table.
        default_beams: beams for a case without an RTPLAN, by name (``"imrt9"``, ``"vmat2"``, ...).
    """

    def __init__(self, keys: KeysCollection = Keys.IMAGE, prescription_gy=None, technique: str | None = None,
                 site: str | None = None, roi_map: Mapping[str, str] | None = None,
                 default_beams: str | None = None) -> None:
        super().__init__(keys)
        self.options = {"prescription_gy": prescription_gy, "technique": technique, "site": site, "roi_map": roi_map,
                        "default_beams": default_beams}

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        out = dict(data)
        for key in self.key_iterator(out):
            # options sent with a request (MONAI Label) come before those of the config
            asked = {name: out[name] for name in self.options if out.get(name) is not None}
            case = read_case(out[key], **{**self.options, **asked})
            name = out.get("case_name")  # of a case that shares its own name with another
            out[Keys.CASE] = replace(case, name=name) if name else case
        return out


class WorkingGridd(MapTransform):
    """Bring ``data["case"]`` onto the grid the network works on; the result goes to ``data["work"]``.

    Args:
        keys: key of the case.
        spacing_mm: voxel size for cases that are finer than ``finest_mm`` or not aligned with LPS.
        finest_mm: aligned cases at least this coarse keep their own voxels, so that nothing is interpolated.
        margin: voxels kept around the body.
    """

    WORK = "work"

    def __init__(self, keys: KeysCollection = Keys.CASE, spacing_mm: Sequence[float] = (3.9, 3.9, 2.5),
                 finest_mm: Sequence[float] = (1.9, 1.9, 1.4), margin: int = 2) -> None:
        super().__init__(keys)
        self.spacing_mm, self.finest_mm, self.margin = tuple(spacing_mm), tuple(finest_mm), margin

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        out = dict(data)
        for key in self.key_iterator(out):
            out[self.WORK] = to_working_grid(out[key], self.spacing_mm, self.finest_mm, self.margin)
        return out


def to_working_grid(case: Case, spacing_mm, finest_mm, margin: int = 2) -> Case:
    """The case on an axis-aligned LPS grid cropped to its body; see :class:`WorkingGridd`."""
    body_box = ndimage.find_objects(case.body.astype(np.int8))[0]
    box = tuple(slice(max(0, s.start - margin), min(n, s.stop + margin)) for s, n in
                zip(body_box, case.grid.shape, strict=True))
    cropped = case.grid.crop(box)
    if cropped.is_axis_aligned and (cropped.spacing_mm >= np.asarray(finest_mm) - 1e-6).all():
        return replace(
            case, grid=cropped, masks={roi: mask[box].copy() for roi, mask in case.masks.items()},
            ct_hu=None if case.ct_hu is None else np.asarray(case.ct_hu[box], dtype=np.float32),
            dose_gy=None if case.dose_gy is None else case.dose_gy[box])
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in cropped.shape])).reshape(3, -1).T
    low, high = cropped.to_world(corners).min(0), cropped.to_world(corners).max(0)
    spacing = _working_spacing(cropped, spacing_mm, finest_mm)
    shape = np.ceil((high - low) / spacing - 1e-4).astype(int) + 1  # rounding must not add a voxel
    grid = Grid.axis_aligned(shape, spacing, (low + high) / 2 - spacing * (shape - 1) / 2)
    masks = {roi: _average(mask, case.grid, grid, 0.0) >= 0.5 for roi, mask in case.masks.items()}
    masks = {roi: mask for roi, mask in masks.items() if mask.any() or roi in case.prescription_gy or roi == BODY}
    return replace(
        case, grid=grid, masks=masks,
        ct_hu=None if case.ct_hu is None else _average(case.ct_hu, case.grid, grid, -1000.0),
        dose_gy=None if case.dose_gy is None else _average(case.dose_gy, case.grid, grid, 0.0))


def _working_spacing(grid: Grid, spacing_mm, finest_mm) -> np.ndarray:
    """Along each patient axis the grid's own spacing where it is coarse enough, else the working one."""
    own = np.array([grid.spacing_mm[np.argmax(np.abs(grid.affine[axis, :3]))] for axis in range(3)])
    return np.where(own >= np.asarray(finest_mm) - 1e-6, own, np.asarray(spacing_mm, dtype=float))


def _average(array: np.ndarray, source: Grid, target: Grid, fill: float) -> np.ndarray:
    """``array`` on ``target``: averaged over about the target's voxel where that is larger, then interpolated."""
    step = np.abs(np.linalg.inv(source.affine[:3, :3]) @ target.affine[:3, :3]).max(axis=1)
    size = np.maximum(1, np.rint(step)).astype(int)
    if array.dtype == bool:
        found = ndimage.find_objects(array.astype(np.int8))
        if not found or found[0] is None:
            return np.zeros(target.shape, dtype=np.float32)
        box = tuple(slice(max(0, s.start - 2 * k - 1), min(n, s.stop + 2 * k + 1))
                    for s, k, n in zip(found[0], size, array.shape, strict=True))
        array, source = array[box], source.crop(box)
    smooth = array.astype(np.float32)
    for axis, n in enumerate(size):
        if n > 1:  # an even number of voxels is centred by half weights at both ends; uniform_filter would shift it
            weights = np.ones(n) / n if n % 2 else np.array([0.5, *np.ones(n - 1), 0.5]) / n
            smooth = ndimage.correlate1d(smooth, weights, axis=axis, mode="nearest")
    return resample(smooth, source, target, order=1, fill=fill)
