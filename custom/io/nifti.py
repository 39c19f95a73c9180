"""Dose volumes as NIfTI."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

from custom.case import Grid

__all__ = ["read_nifti", "write_nifti"]


def write_nifti(path: str | Path, volume: np.ndarray, grid: Grid, description: str) -> None:
    """Write ``[i, j, k]`` as float32 with the grid's RAS affine in mm.

    Args:
        description: up to 79 ASCII characters for the header's ``descrip``.
    """
    image = nib.Nifti1Image(np.asarray(volume, dtype=np.float32), grid.ras_affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode("ascii")[:79]
    nib.save(image, path)


def read_nifti(path: str | Path) -> np.ndarray:
    """The volume ``[i, j, k]`` that :func:`write_nifti` wrote, as float32."""
    return np.asanyarray(nib.load(path).dataobj, dtype=np.float32)
