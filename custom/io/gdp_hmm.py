"""GDP-HMM (AAPM 2025): one ``.npz`` a plan, holding a pickled dict.

Arrays are ``(z, y, x)`` with ``x`` to the patient's left, ``y`` posterior and ``z`` superior, voxels (2.0, 2.5, 2.5) mm
unless the dict tells its spacing. The pickle is read by an unpickler that admits numpy arrays and plain values only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from custom.case import BODY, Beam, Case, CaseError, Grid, Technique
from custom.io.consistency import check_isocentres
from custom.io.course import (
    ReadOptions,
    beams_by_name,
    case_name,
    check_dose,
    check_hu,
    default_isocenter_mm,
    guess_site,
    prescribe,
)
from custom.io.dataset import check_bounds
from custom.io.npz_dict import read_npz_dict
from custom.rois import RoiAssignment, RoiTable, assign_rois

__all__ = ["read_gdp_hmm"]

SPACING_ZYX_MM = (2.0, 2.5, 2.5)
HU_RANGE = (-1024, 3071)
VOXEL_MM, MAX_ANGLES = (0.2, 20.0), 1000
NOT_STRUCTURES = {"all_mask", "angle_list", "angle_plate", "beam_plate", "direction", "dose", "dose_scale", "img",
                  "isVMAT", "isocenter", "origin", "size", "spacing"}
IPSILATERAL, CONTRALATERAL = ("ips", "lps"), ("con",)


def read_gdp_hmm(path: str | Path, options: ReadOptions | None = None) -> Case:
    """Read one plan. The dose levels lie in the data set's ``PTV_DICT.json``: pass them as ``prescription_gy``.

    Structures that are only there without their overlap with the PTV (``Larynx-PTV``) stand for the organ, with a note.

    Args:
        path: the ``.npz`` file.
        options: what the user tells.

    Raises:
        CaseError: for another layout, values that no plan has, or without a prescription.
    """
    path, options = Path(path), options or ReadOptions()
    content = read_npz_dict(path)
    image = _volume(content, "img", None, path)
    grid = _grid(content, image.shape, path)
    names = [k for k, v in content.items() if k not in NOT_STRUCTURES and isinstance(v, np.ndarray) and v.ndim == 3]
    names = [k for k in names if _volume(content, k, image.shape, path).any()]
    rois = _assign(names, content, options.roi_map, options.table)
    notes = list(rois.notes)
    masks = {name: _to_lps(content[names[i]] > 0) for name, i in rois.index.items()}
    if BODY not in masks:
        raise CaseError(f"{path}: no Body; found {', '.join(names) or 'no structure'}. Take the file from the data set "
                        "anew, or name the body in roi_map")
    levels, more = prescribe(rois, names, options.prescription_gy, table=options.table)
    notes += more
    isocenter_mm = _isocenter_mm(content, grid, masks, levels, notes)
    technique = options.technique or (Technique.VMAT if content.get("isVMAT") else Technique.IMRT)
    beams = _beams(content, technique, isocenter_mm, options.default_beams, notes)
    check_isocentres(beams, masks[BODY], grid, path, notes)
    site = options.site
    if site is None:
        site, note = guess_site(masks)
        notes += [note] if note else []
    ct_hu = np.clip(_to_lps(image.astype(np.float32)), *HU_RANGE)
    check_hu(ct_hu, masks[BODY], path)
    dose_gy = _dose(content, image.shape, path)
    return Case(
        name=case_name(path), grid=grid, ct_hu=ct_hu, masks=masks, prescription_gy=levels, beams=beams,
        technique=technique, site=site, dose_gy=dose_gy, dose_grid=grid if dose_gy is not None else None,
        source={"format": "gdp_hmm", "path": str(path), "notes": notes},
    )


def _volume(content: Mapping[str, Any], key: str, shape: tuple[int, ...] | None, path: Path) -> np.ndarray:
    """A 3D array of finite numbers, of ``shape`` where it is given."""
    array = content.get(key)
    if not isinstance(array, np.ndarray) or array.ndim != 3 or array.dtype.kind not in "biuf":
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise CaseError(f"{path}: {key!r} is {found}; expected a 3D array of numbers. Found the keys "
                        f"{sorted(map(str, content))}")
    if shape is not None and array.shape != shape:
        raise CaseError(f"{path}: {key!r} has the shape {array.shape}; expected that of 'img', {shape}. Take the file "
                        "from the data set anew")
    check_bounds(array.shape, path)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise CaseError(f"{path}: {key!r} holds values that are not finite; take the file from the data set anew")
    return array


def _dose(content: Mapping[str, Any], shape: tuple[int, ...], path: Path) -> np.ndarray | None:
    """Gy; None where the file has no dose."""
    if content.get("dose") is None:
        return None
    scale = np.asarray(content.get("dose_scale", 1.0), dtype=np.float64).ravel()
    if scale.size != 1 or not np.isfinite(scale).all() or scale[0] <= 0:
        raise CaseError(f"{path}: dose_scale {scale}; expected one positive number")
    dose_gy = _to_lps(_volume(content, "dose", shape, path).astype(np.float32)) * np.float32(scale[0])
    check_dose(dose_gy, path)
    return dose_gy


def _to_lps(array: np.ndarray) -> np.ndarray:
    """(z, y, x) -> [i, j, k] along left, posterior, superior."""
    return np.ascontiguousarray(array.transpose(2, 1, 0))


def _grid(content: Mapping[str, Any], shape_zyx: tuple[int, ...], path: Path) -> Grid:
    """``spacing`` and ``origin`` are (x, y, z) where present, as SimpleITK has them."""
    spacing = np.asarray(content.get("spacing", SPACING_ZYX_MM[::-1]), dtype=np.float64).ravel()
    origin = np.asarray(content.get("origin", (0.0, 0.0, 0.0)), dtype=np.float64).ravel()
    low, high = VOXEL_MM
    if spacing.size != 3 or origin.size != 3 or not (low <= spacing.min() and spacing.max() <= high):
        raise CaseError(f"{path}: spacing {spacing} and origin {origin}; expected three values each, voxels of {low:g} "
                        f"to {high:g} mm")
    return Grid.axis_aligned(shape_zyx[::-1], spacing, origin)


def _assign(names: list[str], content: Mapping[str, Any], roi_map, table: RoiTable | None) -> RoiAssignment:
    """Structures of the file; the data set's derived organs stand in for organs that are not there themselves."""
    table = table or RoiTable()
    mapped = {n: _side_from_position(n, content) for n in names}
    mapped = {n: t for n, t in mapped.items() if t is not None}
    plain = {table.match(n).name for n in names if not table.match(n).is_helper}
    for name in names:
        match = table.match(name)
        optimised = match.is_target and "opt" in name.lower()  # PTVHighOPT comes without a PTVHigh
        if match.is_helper and (optimised or not match.is_target) and match.name:
            if match.name not in plain | set(mapped.values()):
                mapped[name] = match.name
    user = dict(roi_map or {})
    asked = {k.lower() for k in user}
    taken = set(user.values())
    stand_ins = {n: t for n, t in mapped.items() if n.lower() not in asked and t not in taken and t not in plain}
    rois = assign_rois(names, table, {**stand_ins, **user})
    rois.notes[:0] = [f"{target}: the derived {name!r} stands in" for name, target in sorted(stand_ins.items())]
    return rois


def _side_from_position(name: str, content: Mapping[str, Any]) -> str | None:
    """``ParotidIps-PTV`` and ``ParotidCon-PTV`` -> Parotid_L or _R, by which lies further to the left."""
    stem = name.lower().removeprefix("parotid").removeprefix("parotd").split("-")[0]
    if not name.lower().startswith(("parotid", "parotd")) or stem not in IPSILATERAL + CONTRALATERAL:
        return None
    x = ndimage.center_of_mass(content[name] > 0)[2]
    body = content.get("Body", content.get("BODY"))
    middle = ndimage.center_of_mass(body > 0)[2] if body is not None else content[name].shape[2] / 2
    return "Parotid_L" if x > middle else "Parotid_R"


def _isocenter_mm(content, grid: Grid, masks, levels, notes: list[str]):
    """``isocenter`` is [z, y, x] in voxels of the arrays."""
    value = np.asarray(content.get("isocenter", []), dtype=np.float64).ravel()
    if value.size != 3:
        notes.append("no isocentre: the centre of the targets is used")
        return default_isocenter_mm(masks, levels, grid)
    return tuple(float(v) for v in grid.to_world(value[::-1]))


def _beams(content, technique: str, isocenter_mm, default_beams: str | None, notes: list[str]) -> tuple[Beam, ...]:
    angles = [float(a) % 360.0 for a in np.asarray(content.get("angle_list", []), dtype=np.float64).ravel()]
    if not np.isfinite(angles).all() or len(angles) > MAX_ANGLES:
        raise CaseError(f"angle_list holds {len(angles)} values, not all of them angles; expected up to {MAX_ANGLES} "
                        "in degrees")
    if not angles:
        name = default_beams or ("vmat2" if technique == Technique.VMAT else "imrt9")
        notes.append(f"no beam angles: default beams {name!r}")
        return beams_by_name(name, isocenter_mm)
    if technique == Technique.VMAT:
        return (Beam("Arc", tuple(angles), isocenter_mm),)
    return tuple(Beam(f"G{a:03.0f}", (a,), isocenter_mm) for a in angles)
