"""Packed cases: one small file a patient, to carry a data set to another machine (``python -m custom.io``).

A zip archive of plain numpy arrays, none pickled: CT in steps of 8 HU, dose in steps of 5 cGy, one bit a voxel for each
structure, and a header in JSON. An OpenKBP patient takes about 0.3 MB instead of 5.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from custom.case import Beam, Case, CaseError, Grid
from custom.io.course import ReadOptions, case_name
from custom.whole import whole_file

__all__ = ["SUFFIX", "is_packed_file", "read_packed", "write_packed"]

SUFFIX = ".packed.npz"
LAYOUT = "packed case 1"
HU_STEP, HU_LOWEST = 8, -1024
DOSE_STEP_GY = 0.05
LATE_OPTIONS = ("prescription_gy", "technique", "site", "roi_map", "default_beams")
MAX_VOXELS = 512 * 512 * 1000


def is_packed_file(path: Path) -> bool:
    """True for a file of this format, by its name."""
    return path.name.lower().endswith(SUFFIX) and path.is_file()


def write_packed(case: Case, path: str | Path) -> None:
    """Write one case; the file is there whole or not at all.

    CT numbers are rounded to 8 HU and end at 1016 HU, doses to 5 cGy. What the case came from is not kept.

    Args:
        path: ``NAME.packed.npz``.

    Raises:
        CaseError: another ending.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIX):
        raise CaseError(f"{path}: a packed case's name ends in {SUFFIX}")
    header = {
        "layout": LAYOUT, "shape": list(case.grid.shape), "affine": case.grid.affine.tolist(),
        "prescription_gy": dict(case.prescription_gy), "technique": case.technique, "site": case.site,
        "beams": [[beam.name, list(beam.gantry_deg), list(beam.isocenter_mm)] for beam in case.beams],
        "masks": list(case.masks),
    }  # fmt: skip
    arrays = {f"mask_{n}": np.packbits(np.asarray(mask, bool).ravel()) for n, mask in enumerate(case.masks.values())}
    if case.ct_hu is not None:
        arrays["ct"] = _rounded((case.ct_hu - HU_LOWEST) / HU_STEP, np.uint8)
    if case.dose_gy is not None:
        arrays["dose"] = _rounded(case.dose_gy / DOSE_STEP_GY, np.uint16)
    header_bytes = np.frombuffer(json.dumps(header).encode(), np.uint8)
    with whole_file(path) as part, part.open("wb") as stream:
        np.savez_compressed(stream, header=header_bytes, **arrays)


def read_packed(path: str | Path, options: ReadOptions | None = None) -> Case:
    """Read one packed case, named after its file.

    Args:
        path: ``NAME.packed.npz``.
        options: what the user tells; structures, prescription and beams were settled when the case was packed.

    Raises:
        CaseError: a file that is damaged or not in this layout, or options that come too late.
    """
    path = Path(path)
    late = [name for name in LATE_OPTIONS if getattr(options, name, None)]
    if late:
        raise CaseError(f"{path}: a packed case keeps what it was packed with; found {', '.join(late)}. Give them with "
                        "the case it was made from")
    try:
        _check_size(path)
        with np.load(path, allow_pickle=False) as archive:
            header = json.loads(archive["header"].tobytes())
            if not isinstance(header, dict) or header.get("layout") != LAYOUT:
                raise CaseError(f"{path}: layout {header.get('layout')!r}; expected {LAYOUT!r}. Pack the case anew")
            return _case(path, header, archive)
    except (CaseError, MemoryError):
        raise
    except Exception as error:  # zipfile, numpy and json raise a dozen kinds on damaged files
        text = " ".join(str(error).split())[:200]
        raise CaseError(f"{path}: not a packed case ({type(error).__name__}: {text}); expected a file written by "
                        "python -m custom.io. Pack the case anew") from error


def _case(path: Path, header: Mapping[str, Any], archive: Mapping[str, np.ndarray]) -> Case:
    grid = Grid(tuple(header["shape"]), np.asarray(header["affine"]))
    voxels = int(np.prod(grid.shape))
    if not 0 < voxels <= MAX_VOXELS:
        raise CaseError(f"{path}: {voxels} voxels; expected 1 to {MAX_VOXELS}")
    masks = {name: np.unpackbits(archive[f"mask_{n}"], count=voxels).astype(bool).reshape(grid.shape)
             for n, name in enumerate(header["masks"])}
    ct = dose = None
    if "ct" in archive:
        ct = archive["ct"].reshape(grid.shape).astype(np.float32) * HU_STEP + HU_LOWEST
    if "dose" in archive:
        dose = archive["dose"].reshape(grid.shape).astype(np.float32) * np.float32(DOSE_STEP_GY)
    beams = tuple(Beam(name, tuple(angles), tuple(isocentre)) for name, angles, isocentre in header["beams"])
    return Case(case_name(path), grid, ct, masks, header["prescription_gy"], beams, header["technique"], header["site"],
                dose_gy=dose, source={"format": "packed", "path": str(path), "notes": []})


def _check_size(path: Path) -> None:
    """No archive that unfolds to more than the largest case: 40 structures, CT and dose."""
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > 10 * MAX_VOXELS:
        raise CaseError(f"{path}: unfolds to {size} bytes; expected at most {10 * MAX_VOXELS}")


def _rounded(values: np.ndarray, dtype: type) -> np.ndarray:
    return np.clip(np.rint(values), 0, np.iinfo(dtype).max).astype(dtype)
