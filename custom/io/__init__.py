"""File formats <-> :class:`custom.case.Case`: DICOM-RT folders, OpenKBP folders, GDP-HMM files, packed cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from custom.case import Case, CaseError
from custom.io.course import ReadOptions
from custom.io.dataset import reading
from custom.io.dicom_folder import read_dicom
from custom.io.find import find_cases, is_gdp_hmm_file
from custom.io.gdp_hmm import read_gdp_hmm
from custom.io.openkbp import is_openkbp_folder, read_openkbp, write_dose_csv
from custom.io.packed import is_packed_file, read_packed
from custom.io.rtdose import PREDICTED, write_rtdose
from custom.rois import RoiTable

__all__ = ["PREDICTED", "ReadOptions", "find_cases", "read_case", "write_dose_csv", "write_rtdose"]


def read_case(path: str | Path, *, roi_table: str | Path | None = None, **options: Any) -> Case:
    """Read one case; the reader follows from what the folder or file holds.

    Args:
        path: a DICOM folder (nested and mixed), an RTSTRUCT file beside its CT, an OpenKBP patient folder, a GDP-HMM
            ``.npz`` file, or a packed case.
        roi_table: alias table other than the bundle's ``roi_aliases.json``.
        **options: of :class:`custom.io.course.ReadOptions`: ``prescription_gy``, ``technique``, ``site``, ``roi_map``,
            ``default_beams``, ``mask_engine``.

    Raises:
        CaseError: when nothing readable is there, or it contradicts itself; the message says what to do.
    """
    path = Path(path)
    if not path.exists():
        raise CaseError(f"{path}: there is no such file or folder")
    told = ReadOptions(table=RoiTable(roi_table), **options)
    with reading(path):
        if path.is_dir() and is_openkbp_folder(path):
            return read_openkbp(path, told)
        if is_packed_file(path):
            return read_packed(path, told)
        if is_gdp_hmm_file(path):
            return read_gdp_hmm(path, told)
        if path.suffix.lower() == ".npz":
            raise CaseError(f"{path}: no GDP-HMM file; expected a zip archive with arr_0.npy alone. It may be cut "
                            "short: copy it anew")
        return read_dicom(path, told)
