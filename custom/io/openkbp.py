"""OpenKBP: one folder of sparse CSV vectors a patient (Babier et al., Med. Phys. 2021).

The flat index of every file runs in C order over ``(128, 128, 128)`` with axes anterior -> posterior, patient
right -> left, superior -> inferior. The canonical array ``[i, j, k]`` (+left, +posterior, +superior) is therefore
``csv.transpose(1, 0, 2)[:, :, ::-1]``. ``voxel_dimensions.csv`` holds the AP, LR and SI voxel size in mm.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from custom.case import BODY, Case, CaseError, Grid, Site
from custom.io.course import (
    ReadOptions,
    beams_by_name,
    case_name,
    check_dose,
    check_hu,
    default_isocenter_mm,
    prescribe,
    technique_of,
)
from custom.rois import assign_rois
from custom.whole import whole_file

__all__ = ["SHAPE", "is_openkbp_folder", "read_openkbp", "write_dose_csv"]

SHAPE = (128, 128, 128)
MASK_FILE, VOXEL_FILE, CT_FILE, DOSE_FILE = "possible_dose_mask.csv", "voxel_dimensions.csv", "ct.csv", "dose.csv"
HU_OFFSET, HU_RANGE = 1024, (-1024, 3071)
DEFAULT_BEAMS = "imrt9"
MAX_OUTSIDE, MAX_WITHOUT_CT = 0.05, 0.2
VOXEL_MM = (0.2, 20.0)
MAX_FILE_BYTES = 256 * 1024**2


def is_openkbp_folder(path: Path) -> bool:
    """True when the folder holds one OpenKBP patient, or what is left of one; its reader says what is missing."""
    return (path / MASK_FILE).is_file() or (path / VOXEL_FILE).is_file()


def read_openkbp(path: str | Path, options: ReadOptions | None = None) -> Case:
    """Read one patient folder; CT and dose may be absent.

    Args:
        path: folder with ``possible_dose_mask.csv``, ``voxel_dimensions.csv`` and one CSV a structure.
        options: what the user tells.

    Raises:
        CaseError: for a file that is not in this layout, or is cut short.
    """
    options = options or ReadOptions()
    path = Path(path)
    grid = Grid.axis_aligned(SHAPE, _read_spacing_mm(path / VOXEL_FILE))
    files = sorted(p for p in path.glob("*.csv")
                   if p.name not in {MASK_FILE, VOXEL_FILE, CT_FILE, DOSE_FILE} and not p.name.startswith("."))
    names = [p.stem for p in files]
    rois = assign_rois(names, options.table, options.roi_map)
    notes = list(rois.notes)
    masks = {name: _read_mask(files[i]) for name, i in rois.index.items()}
    masks[BODY] = _read_mask(path / MASK_FILE)
    _check_inside(masks, path, notes)
    masks = {name: mask for name, mask in masks.items() if mask.any()}
    ct_hu = None
    if (path / CT_FILE).is_file():
        ct_hu = np.clip(_read_values(path / CT_FILE) - HU_OFFSET, *HU_RANGE)
        absent = float(np.mean(ct_hu[masks[BODY]] == HU_RANGE[0]))
        if absent > MAX_WITHOUT_CT:
            raise CaseError(f"{path / CT_FILE}: {100 * absent:.0f} % of the body has no value; expected at most "
                            f"{100 * MAX_WITHOUT_CT:g} %. The file is cut short, or of another patient")
        check_hu(ct_hu, masks[BODY], path / CT_FILE)
    else:
        notes.append("no ct.csv: the case has no CT")
    dose_gy = None
    if (path / DOSE_FILE).is_file():
        dose_gy = _read_values(path / DOSE_FILE)
        check_dose(dose_gy, path / DOSE_FILE)
    levels, more = prescribe(rois, names, options.prescription_gy, table=options.table)
    notes += more
    beams = beams_by_name(options.default_beams or DEFAULT_BEAMS, default_isocenter_mm(masks, levels, grid))
    return Case(
        name=case_name(path), grid=grid, ct_hu=ct_hu, masks=masks, prescription_gy=levels, beams=beams,
        technique=options.technique or technique_of(beams), site=options.site or Site.HEAD_NECK, dose_gy=dose_gy,
        dose_grid=grid if dose_gy is not None else None,
        source={"format": "openkbp", "path": str(path), "notes": notes},
    )


def _check_inside(masks: dict[str, np.ndarray], path: Path, notes: list[str]) -> None:
    """Refuse an empty mask of possible dose and targets outside it; note empty structures."""
    body = masks[BODY]
    if not body.any():
        raise CaseError(f"{path / MASK_FILE}: no voxel; expected the body. Copy the file anew")
    for name, mask in masks.items():
        if not mask.any() and name.startswith("PTV"):
            raise CaseError(f"{path}: {name} has no voxel; expected a target. Copy its file anew, or delete the "
                            "file of a target that is not there")
        if not mask.any():
            notes.append(f"{name}: no voxel, taken as absent")
        elif name.startswith("PTV") and np.count_nonzero(mask & ~body) > MAX_OUTSIDE * np.count_nonzero(mask):
            outside = np.count_nonzero(mask & ~body) / np.count_nonzero(mask)
            raise CaseError(f"{path}: {100 * outside:.0f} % of the target {name} lies outside {MASK_FILE}; expected "
                            f"at most {100 * MAX_OUTSIDE:g} %. The mask is cut short, or of another patient")


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
    with whole_file(path) as part, part.open("w", encoding="ascii") as file:
        file.write(",data\n")
        file.writelines(f"{i},{v:.6g}\n" for i, v in zip(index.tolist(), flat[index].tolist()))


def _from_file_order(array: np.ndarray) -> np.ndarray:
    """File axes (AP, RL, SI) -> canonical (L, P, S)."""
    return np.ascontiguousarray(array.reshape(SHAPE).transpose(1, 0, 2)[:, :, ::-1])


def _to_file_order(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array[:, :, ::-1].transpose(1, 0, 2))


def _read_spacing_mm(path: Path) -> tuple[float, float, float]:
    """Voxel size along (L, P, S)."""
    try:
        ap_mm, lr_mm, si_mm = (float(word) for word in _bytes(path).split())
    except ValueError as error:
        raise CaseError(f"{path}: expected three voxel sizes in mm ({error}); copy the file anew") from error
    low, high = VOXEL_MM
    if not all(low <= v <= high for v in (ap_mm, lr_mm, si_mm)):
        raise CaseError(f"{path}: voxel sizes {ap_mm:g}, {lr_mm:g}, {si_mm:g}; expected {low:g} to {high:g} mm")
    return lr_mm, ap_mm, si_mm


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise CaseError(f"{path}: there is no such file; an OpenKBP patient needs it. Copy the folder anew")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise CaseError(f"{path}: {path.stat().st_size} bytes; expected at most {MAX_FILE_BYTES} of an OpenKBP file")
    return path.read_bytes()


def _rows(path: Path) -> list[bytes]:
    """All numbers of a file; the line end after the last row tells that nothing is cut off."""
    content = _bytes(path).replace(b"\r", b"")
    header, _, body = content.partition(b"\n")
    if header.strip().split(b",")[-1:] != [b"data"]:
        raise CaseError(f"{path}: expected the header ',data' of an OpenKBP file, found {header[:40]!r}")
    if not content.endswith(b"\n"):
        raise CaseError(f"{path}: the last line has no line end: the file is cut short. Copy it anew")
    return body.replace(b",", b" ").split()


def _indices(path: Path, values) -> np.ndarray:
    found = np.array(values, dtype=np.float64)
    if not np.isfinite(found).all() or (found % 1).any():
        raise CaseError(f"{path}: an index is no whole number; expected rows 'index,value'. Copy the file anew")
    if found.size and not (0 <= found.min() and found.max() < np.prod(SHAPE)):
        raise CaseError(f"{path}: an index lies outside 0..{np.prod(SHAPE) - 1}; expected a {SHAPE} volume")
    index = found.astype(np.int64)
    if index.size and np.bincount(index).max() > 1:
        raise CaseError(f"{path}: index {np.bincount(index).argmax()} is there more than once; expected each voxel "
                        "once. Copy the file anew")
    return index


def _read_mask(path: Path) -> np.ndarray:
    flat = np.zeros(int(np.prod(SHAPE)), dtype=bool)
    try:
        words = np.array(_rows(path), dtype=np.float64)
    except CaseError:
        raise
    except ValueError as error:
        raise CaseError(f"{path}: expected rows 'index,' of a mask ({error}); copy the file anew") from error
    flat[_indices(path, words)] = True
    return _from_file_order(flat)


def _read_values(path: Path) -> np.ndarray:
    """A dense float32 volume of a sparse file ``index,value``."""
    words = _rows(path)
    if len(words) % 2:
        raise CaseError(f"{path}: expected rows 'index,value', found {len(words)} numbers; copy the file anew")
    try:
        pairs = np.array(words, dtype=np.float64).reshape(-1, 2)
    except ValueError as error:
        raise CaseError(f"{path}: expected numbers in rows 'index,value' ({error}); copy the file anew") from error
    index = _indices(path, pairs[:, 0])
    if not np.isfinite(pairs[:, 1]).all():
        row = int(index[~np.isfinite(pairs[:, 1])][0])
        raise CaseError(f"{path}: the value at index {row} is not a finite number; copy the file anew")
    flat = np.zeros(int(np.prod(SHAPE)), dtype=np.float32)
    flat[index] = pairs[:, 1]
    return _from_file_order(flat)
