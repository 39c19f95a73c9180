"""OpenKBP: one folder of sparse CSV vectors a patient (Babier et al., Med. Phys. 2021).

The flat index of every file runs in C order over ``(128, 128, 128)`` with axes anterior -> posterior, patient
right -> left, superior -> inferior. The canonical array ``[i, j, k]`` (+left, +posterior, +superior) is therefore
``csv.transpose(1, 0, 2)[:, :, ::-1]``. ``voxel_dimensions.csv`` holds the AP, LR and SI voxel size in mm.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from custom.case import BODY, Case, CaseError, Grid, Site
from custom.io.course import beams_by_name, case_name, default_isocenter_mm, prescribe, technique_of
from custom.rois import RoiTable, assign_rois

__all__ = ["SHAPE", "is_openkbp_folder", "read_openkbp", "write_dose_csv"]

SHAPE = (128, 128, 128)
MASK_FILE, VOXEL_FILE, CT_FILE, DOSE_FILE = "possible_dose_mask.csv", "voxel_dimensions.csv", "ct.csv", "dose.csv"
HU_OFFSET, HU_RANGE = 1024, (-1024, 3071)
DEFAULT_BEAMS = "imrt9"


def is_openkbp_folder(path: Path) -> bool:
    """True when the folder holds one OpenKBP patient."""
    return (path / MASK_FILE).is_file() and (path / VOXEL_FILE).is_file()


def read_openkbp(
    path: str | Path,
    *,
    prescription_gy=None,
    technique: str | None = None,
    site: str | None = None,
    roi_map=None,
    default_beams: str | None = None,
    table: RoiTable | None = None,
) -> Case:
    """Read one patient folder; CT and dose may be absent.

    Args:
        path: folder with ``possible_dose_mask.csv``, ``voxel_dimensions.csv`` and one CSV a structure.
        prescription_gy, technique, site, roi_map, default_beams: as in :func:`custom.io.read_case`.

    Raises:
        CaseError: for a file that is not in this layout.
    """
    path = Path(path)
    grid = Grid.axis_aligned(SHAPE, _read_spacing_mm(path / VOXEL_FILE))
    files = sorted(p for p in path.glob("*.csv")
                   if p.name not in {MASK_FILE, VOXEL_FILE, CT_FILE, DOSE_FILE} and not p.name.startswith("."))
    names = [p.stem for p in files]
    rois = assign_rois(names, table, roi_map)
    notes = list(rois.notes)
    masks = {name: _read_mask(files[i]) for name, i in rois.index.items()}
    masks[BODY] = _read_mask(path / MASK_FILE)
    ct_hu = None
    if (path / CT_FILE).is_file():
        ct_hu = np.clip(_read_values(path / CT_FILE) - HU_OFFSET, *HU_RANGE)
    else:
        notes.append("no ct.csv: the case has no CT")
    dose_gy = _read_values(path / DOSE_FILE) if (path / DOSE_FILE).is_file() else None
    levels, more = prescribe(rois, names, prescription_gy, table=table)
    notes += more
    beams = beams_by_name(default_beams or DEFAULT_BEAMS, default_isocenter_mm(masks, levels, grid))
    return Case(
        name=case_name(path), grid=grid, ct_hu=ct_hu, masks=masks, prescription_gy=levels, beams=beams,
        technique=technique or technique_of(beams), site=site or Site.HEAD_NECK, dose_gy=dose_gy,
        dose_grid=grid if dose_gy is not None else None,
        source={"format": "openkbp", "path": str(path), "notes": notes},
    )


def write_dose_csv(path: str | Path, dose_gy: np.ndarray, mask: np.ndarray) -> None:
    """Write a dose as OpenKBP's ``dose.csv``, zero outside the possible dose mask; whole or not at all.

    Args:
        path: the file to write.
        dose_gy: ``(128, 128, 128)`` in Gy, canonical ``[i, j, k]``.
        mask: the possible dose mask, same shape.
    """
    path = Path(path)
    if dose_gy.shape != SHAPE or mask.shape != SHAPE:
        raise CaseError(f"dose.csv: the dose has shape {dose_gy.shape}, the mask {mask.shape}; expected {SHAPE}")
    flat = _to_file_order(np.where(mask, dose_gy, 0)).ravel()
    index = np.flatnonzero(flat)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(",data\n")
            file.writelines(f"{i},{v:.6g}\n" for i, v in zip(index.tolist(), flat[index].tolist()))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _from_file_order(array: np.ndarray) -> np.ndarray:
    """File axes (AP, RL, SI) -> canonical (L, P, S)."""
    return np.ascontiguousarray(array.reshape(SHAPE).transpose(1, 0, 2)[:, :, ::-1])


def _to_file_order(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array[:, :, ::-1].transpose(1, 0, 2))


def _read_spacing_mm(path: Path) -> tuple[float, float, float]:
    """Voxel size along (L, P, S)."""
    try:
        ap_mm, lr_mm, si_mm = np.loadtxt(path).reshape(3)
    except (OSError, ValueError) as error:
        raise CaseError(f"{path}: expected three voxel sizes in mm ({error})") from error
    return float(lr_mm), float(ap_mm), float(si_mm)


def _rows(path: Path) -> list[bytes]:
    try:
        header, _, body = path.read_bytes().replace(b"\r", b"").partition(b"\n")
    except OSError as error:
        raise CaseError(f"{path}: cannot be read ({error})") from error
    if header.strip().split(b",")[-1:] != [b"data"]:
        raise CaseError(f"{path}: expected the header ',data' of an OpenKBP file, found {header[:40]!r}")
    return body.replace(b",", b" ").split()


def _indices(path: Path, values) -> np.ndarray:
    index = np.array(values, dtype=np.float64).astype(np.int64)
    if index.size and not (0 <= index.min() and index.max() < np.prod(SHAPE)):
        raise CaseError(f"{path}: an index lies outside 0..{np.prod(SHAPE) - 1}; expected a {SHAPE} volume")
    return index


def _read_mask(path: Path) -> np.ndarray:
    flat = np.zeros(int(np.prod(SHAPE)), dtype=bool)
    try:
        flat[_indices(path, _rows(path))] = True
    except ValueError as error:
        raise CaseError(f"{path}: expected rows 'index,' of a mask ({error})") from error
    return _from_file_order(flat)


def _read_values(path: Path) -> np.ndarray:
    """A dense float32 volume of a sparse file ``index,value``."""
    words = _rows(path)
    if len(words) % 2:
        raise CaseError(f"{path}: expected rows 'index,value', found {len(words)} numbers")
    try:
        pairs = np.array(words, dtype=np.float64).reshape(-1, 2)
    except ValueError as error:
        raise CaseError(f"{path}: expected numbers in rows 'index,value' ({error})") from error
    flat = np.zeros(int(np.prod(SHAPE)), dtype=np.float32)
    flat[_indices(path, pairs[:, 0])] = pairs[:, 1]
    return _from_file_order(flat)
