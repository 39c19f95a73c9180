"""File formats <-> :class:`custom.case.Case`: DICOM-RT folders, OpenKBP folders, GDP-HMM files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from custom.case import Case, CaseError
from custom.io.dicom_folder import read_dicom
from custom.io.find import find_cases, is_gdp_hmm_file
from custom.io.gdp_hmm import read_gdp_hmm
from custom.io.openkbp import is_openkbp_folder, read_openkbp, write_dose_csv
from custom.io.rtdose import PREDICTED, write_rtdose
from custom.rois import RoiTable

__all__ = ["PREDICTED", "find_cases", "read_case", "write_dose_csv", "write_rtdose"]


def read_case(
    path: str | Path,
    *,
    prescription_gy: Mapping[str, float] | float | None = None,
    technique: str | None = None,
    site: str | None = None,
    roi_map: Mapping[str, str | None] | None = None,
    default_beams: str | None = None,
    roi_table: str | Path | None = None,
    mask_engine: str = "exact",
) -> Case:
    """Read one case; the reader follows from what the folder or file holds.

    Args:
        path: a DICOM folder (nested and mixed), an RTSTRUCT file beside its CT, an OpenKBP patient folder, or a
            GDP-HMM ``.npz`` file.
        prescription_gy: dose by target (its name in the file or TG-263), or one number for the highest target; wins
            over the RTPLAN and the target names.
        technique: "IMRT" or "VMAT"; by default what the beams are.
        site: "HeadNeck" or "Lung"; by default what the structures tell.
        roi_map: ROI name -> TG-263 name, before the alias table; None or "" leaves the ROI out.
        default_beams: "imrt9", "imrt7", "vmat1" or "vmat2", for a case without an RTPLAN.
        roi_table: alias table other than the bundle's ``roi_aliases.json``.
        mask_engine: "exact" or "rt_utils", for DICOM.

    Raises:
        CaseError: when nothing readable is there, or it contradicts itself; the message says what to do.
    """
    path = Path(path)
    if not path.exists():
        raise CaseError(f"{path}: there is no such file or folder")
    options = {"prescription_gy": prescription_gy, "technique": technique, "site": site, "roi_map": roi_map,
               "default_beams": default_beams, "table": RoiTable(roi_table)}
    if path.is_dir() and is_openkbp_folder(path):
        return read_openkbp(path, **options)
    if is_gdp_hmm_file(path):
        return read_gdp_hmm(path, **options)
    return read_dicom(path, mask_engine=mask_engine, **options)
