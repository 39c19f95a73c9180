"""What the MONAI Deploy SDK does not have: structure masks from an RTSTRUCT, and a writer of RTDOSE.

Both call the bundle's own pipeline in ``custom``, so that an application writes what the bundle's runner writes.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.deploy.core import Fragment, Operator, OperatorSpec
from monai.deploy.core.domain.dicom_series_selection import StudySelectedSeries

from custom.case import CaseError, Keys
from custom.io.course import case_name

__all__ = ["RTDoseWriterOperator", "StructureMasksOperator", "bundle_config"]

logger = logging.getLogger(__name__)


def bundle_config(bundle: Path, options: Mapping[str, object]) -> ConfigParser:
    """The bundle's inference config with some values replaced."""
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "inference.json"))
    parser.config.update(options)
    return parser


class StructureMasksOperator(Operator):
    """CT and structures of a study -> the network's conditions.

    Named input:
        study_selected_series_list: the selected series, CT, RTSTRUCT and RTPLAN.

    Named outputs:
        image: conditions ``(X, Y, Z, C)``, float32, as the bundle's inference operator takes them.
        case: what belongs to them for the writer, the data dictionary of the bundle's preprocessing without tensors.

    Args:
        bundle: folder of the bundle.
        options: values of its inference config, such as ``prescription_gy``.
    """

    def __init__(self, fragment: Fragment, *args, bundle: Path, options: Mapping[str, object], **kwargs) -> None:
        self.bundle, self.options = bundle, dict(options)
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        spec.input("study_selected_series_list")
        spec.output(Keys.IMAGE)
        spec.output(Keys.CASE)

    def compute(self, op_input, op_output, context) -> None:
        files = dicom_files(op_input.receive("study_selected_series_list"))
        data = self.prepare(files)
        image = data.pop(Keys.IMAGE)
        op_output.emit(np.ascontiguousarray(np.moveaxis(np.asarray(image, dtype=np.float32), 0, -1)), Keys.IMAGE)
        op_output.emit({key: value for key, value in data.items() if not isinstance(value, torch.Tensor)}, Keys.CASE)

    def prepare(self, files: Iterable[Path]) -> dict[str, object]:
        """The bundle's preprocessing on these files alone."""
        files = list(files)
        folder = Path(os.path.commonpath([path.parent for path in files]))
        preprocessing = bundle_config(self.bundle, self.options).get_parsed_content("preprocessing")
        with tempfile.TemporaryDirectory(prefix="study.") as temporary:
            study = Path(temporary, folder.name or "study")
            study.mkdir()
            for n, path in enumerate(files):
                (study / f"{n:05d}.dcm").symlink_to(path)
            data = dict(preprocessing({Keys.IMAGE: str(study)}))
        case = data[Keys.CASE]
        data[Keys.CASE] = replace(case, name=case_name(folder), source={**case.source, "path": str(folder)})
        return data


def dicom_files(studies: Iterable[StudySelectedSeries]) -> list[Path]:
    """Files of all selected series.

    Raises:
        CaseError: when nothing was selected.
    """
    files = [Path(instance.get_native_sop_instance().filename).resolve() for study in studies
             for selected in study.selected_series for instance in selected.series.get_sop_instances()]
    if not files:
        raise CaseError("the input folder holds no CT, RTSTRUCT or RTPLAN; expected a DICOM study with CT and RTSTRUCT")
    return files


class RTDoseWriterOperator(Operator):
    """The network's output -> RTDOSE (and NIfTI and report) of the case.

    Named inputs:
        pred: ``(1, X, Y, Z)`` or, with a standard deviation, ``(2, X, Y, Z)``, in fractions of the prescription.
        case: as :class:`StructureMasksOperator` sends it.

    Args:
        bundle: folder of the bundle.
        output_dir: results go to ``output_dir/<case>/``.
        options: values of its inference config, such as ``dose_grid``.
    """

    def __init__(self, fragment: Fragment, *args, bundle: Path, output_dir: Path, options: Mapping[str, object],
                 **kwargs) -> None:
        self.bundle, self.output_dir = bundle, output_dir
        self.options = {**options, "output_dir": str(output_dir)}
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        spec.input(Keys.PRED)
        spec.input(Keys.CASE)

    def compute(self, op_input, op_output, context) -> None:
        pred, data = op_input.receive(Keys.PRED), op_input.receive(Keys.CASE)
        postprocessing = bundle_config(self.bundle, self.options).get_parsed_content("postprocessing")
        postprocessing({**data, Keys.PRED: torch.as_tensor(pred)})
        logger.info("the dose of %s is in %s", data[Keys.CASE].name, self.output_dir / data[Keys.CASE].name)
