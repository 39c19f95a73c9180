"""Synthetic head-and-neck and lung patients: demo and test data that contain nobody's images.

    python -m custom.phantom OUT --site both

writes DICOM studies; :func:`make_case` gives the same patients in memory.
"""

from custom.phantom.cases import make_case, with_dose
from custom.phantom.study import write_study

__all__ = ["make_case", "with_dose", "write_study"]
