"""GDP-HMM (AAPM 2025): one ``.npz`` a plan, holding a pickled dict.

Arrays are ``(z, y, x)`` with ``x`` to the patient's left, ``y`` posterior and ``z`` superior, voxels (2.0, 2.5, 2.5) mm
unless the dict tells its spacing. The pickle is read by an unpickler that admits numpy arrays and plain values only.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from custom.case import BODY, Beam, Case, CaseError, Grid, Technique
from custom.io.course import beams_by_name, case_name, default_isocenter_mm, guess_site, prescribe
from custom.rois import RoiAssignment, RoiTable, assign_rois

__all__ = ["read_gdp_hmm", "read_gdp_hmm_dict"]

SPACING_ZYX_MM = (2.0, 2.5, 2.5)
HU_RANGE = (-1024, 3071)
NOT_STRUCTURES = {"all_mask", "angle_list", "angle_plate", "beam_plate", "direction", "dose", "dose_scale", "img",
                  "isVMAT", "isocenter", "origin", "size", "spacing"}
# globals that a pickle of numpy arrays and scalars names, in numpy 1 and 2
_ADMITTED = {
    (f"numpy.{core}.{module}", name)
    for core in ("core", "_core")
    for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
} | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
IPSILATERAL, CONTRALATERAL = ("ips", "lps"), ("con",)


class _Unpickler(pickle.Unpickler):
    """Admits numpy arrays and plain values; any other global is refused, so that a file cannot run code."""

    def find_class(self, module: str, name: str):
        if (module, name) in _ADMITTED or module == "numpy.dtypes":
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the file names {module}.{name}; only numpy arrays and plain values are admitted")


def read_gdp_hmm_dict(path: str | Path) -> dict[str, Any]:
    """The dict of one file.

    Raises:
        CaseError: for a file in another layout, or one that wants to load anything but arrays and plain values.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as raw:
            stream = io.BytesIO(raw.read())
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
        if not dtype.hasobject or shape != ():
            raise CaseError(f"{path}: arr_0 is a {dtype} array of shape {shape}; expected a dict (GDP-HMM layout)")
        content = _Unpickler(stream).load()
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        if isinstance(error, CaseError):
            raise
        raise CaseError(f"{path}: not a GDP-HMM file ({error})") from error
    content = content.item() if isinstance(content, np.ndarray) else content
    if not isinstance(content, dict):
        raise CaseError(f"{path}: arr_0 holds a {type(content).__name__}; expected a dict (GDP-HMM layout)")
    return content


def read_gdp_hmm(
    path: str | Path,
    *,
    prescription_gy=None,
    technique: str | None = None,
    site: str | None = None,
    roi_map=None,
    default_beams: str | None = None,
    table: RoiTable | None = None,
) -> Case:
    """Read one plan. The dose levels lie in the data set's ``PTV_DICT.json``: pass them as ``prescription_gy``.

    Structures that are only there without their overlap with the PTV (``Larynx-PTV``) stand for the organ, with a note.

    Raises:
        CaseError: for another layout, or without a prescription.
    """
    path = Path(path)
    content = read_gdp_hmm_dict(path)
    image = content.get("img")
    if not isinstance(image, np.ndarray) or image.ndim != 3:
        raise CaseError(f"{path}: no 3D array 'img'; found the keys {sorted(map(str, content))}")
    grid = _grid(content, image.shape)
    names = [k for k, v in content.items() if k not in NOT_STRUCTURES and isinstance(v, np.ndarray)
             and v.shape == image.shape and v.any()]
    rois = _assign(names, content, roi_map, table)
    notes = list(rois.notes)
    masks = {name: _to_lps(content[names[i]] > 0) for name, i in rois.index.items()}
    if BODY not in masks:
        raise CaseError(f"{path}: no Body; found {', '.join(names)}")
    levels, more = prescribe(rois, names, prescription_gy, table=table)
    notes += more
    isocenter_mm = _isocenter_mm(content, grid, masks, levels, notes)
    technique = technique or (Technique.VMAT if content.get("isVMAT") else Technique.IMRT)
    beams = _beams(content, technique, isocenter_mm, default_beams, notes)
    if site is None:
        site, note = guess_site(masks)
        notes += [note] if note else []
    dose_gy = None
    if isinstance(content.get("dose"), np.ndarray) and content["dose"].shape == image.shape:
        dose_gy = _to_lps(content["dose"].astype(np.float32)) * np.float32(content.get("dose_scale", 1.0))
    return Case(
        name=case_name(path), grid=grid, ct_hu=np.clip(_to_lps(image.astype(np.float32)), *HU_RANGE), masks=masks,
        prescription_gy=levels, beams=beams, technique=technique, site=site, dose_gy=dose_gy,
        dose_grid=grid if dose_gy is not None else None,
        source={"format": "gdp_hmm", "path": str(path), "notes": notes},
    )


def _to_lps(array: np.ndarray) -> np.ndarray:
    """(z, y, x) -> [i, j, k] along left, posterior, superior."""
    return np.ascontiguousarray(array.transpose(2, 1, 0))


def _grid(content: Mapping[str, Any], shape_zyx: tuple[int, ...]) -> Grid:
    """``spacing`` and ``origin`` are (x, y, z) where present, as SimpleITK has them."""
    spacing = np.asarray(content.get("spacing", SPACING_ZYX_MM[::-1]), dtype=np.float64).ravel()
    origin = np.asarray(content.get("origin", (0.0, 0.0, 0.0)), dtype=np.float64).ravel()
    if spacing.size != 3 or origin.size != 3 or (spacing <= 0).any():
        raise CaseError(f"GDP-HMM: spacing {spacing} and origin {origin}; expected three values each, in mm")
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
    if not angles:
        name = default_beams or ("vmat2" if technique == Technique.VMAT else "imrt9")
        notes.append(f"no beam angles: default beams {name!r}")
        return beams_by_name(name, isocenter_mm)
    if technique == Technique.VMAT:
        return (Beam("Arc", tuple(angles), isocenter_mm),)
    return tuple(Beam(f"G{a:03.0f}", (a,), isocenter_mm) for a in angles)
