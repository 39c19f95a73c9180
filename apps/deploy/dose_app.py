"""The MONAI Deploy application: a graph of the SDK's operators and two of our own."""

from __future__ import annotations

import json
import os
from pathlib import Path

from dose_operators import RTDoseWriterOperator, StructureMasksOperator
from monai.deploy.conditions import CountCondition
from monai.deploy.core import AppContext, Application
from monai.deploy.core.domain import Image
from monai.deploy.core.io_type import IOType
from monai.deploy.operators.dicom_data_loader_operator import DICOMDataLoaderOperator
from monai.deploy.operators.dicom_series_selector_operator import DICOMSeriesSelectorOperator
from monai.deploy.operators.monai_bundle_inference_operator import (
    BundleConfigNames,
    IOMapping,
    MonaiBundleInferenceOperator,
)

from custom.case import CaseError
from custom.datalists import bundle_root

__all__ = ["OPTIONS_VARIABLE", "DosePredictionApp", "find_bundle", "read_options"]

OPTIONS_VARIABLE = "DOSE_OPTIONS"
OPTIONS = ("prescription_gy", "technique", "site", "roi_map", "default_beams", "dose_grid")
# What the prediction reads of a study. Every series of these kinds is passed on; those that belong together are found
# by their references, as everywhere else (custom.io.dicom_folder).
SELECTION = {"selections": [{"name": kind, "conditions": {"Modality": f"^{kind}$"}}
                            for kind in ("CT", "RTSTRUCT", "RTPLAN")]}


class DosePredictionApp(Application):
    """CT and RTSTRUCT of one study -> RTDOSE, NIfTI and report, in the output folder.

    The bundle is given as the model (``-m`` or ``HOLOSCAN_MODEL_PATH``): its folder, or the folder it lies in. Options
    of the prediction come as JSON in the environment variable ``DOSE_OPTIONS``.
    """

    def compose(self) -> None:
        """Build the graph: loader -> selector -> structure masks -> the bundle -> RTDOSE writer."""
        context: AppContext = Application.init_app_context(self.argv)
        bundle = find_bundle(Path(context.model_path))
        # SDK 4.0.0 makes an empty model of a bundle's folder ("A predictor of the model is not set"); without it the
        # inference operator loads the folder itself.
        context.models = None
        options = read_options(os.environ.get(OPTIONS_VARIABLE, ""))

        loader = DICOMDataLoaderOperator(self, CountCondition(self, 1), input_folder=Path(context.input_path),
                                         name="dicom_loader")
        selector = DICOMSeriesSelectorOperator(self, rules=json.dumps(SELECTION), all_matched=True,
                                               name="series_selector")
        masks = StructureMasksOperator(self, bundle=bundle, options=options, name="structure_masks")
        inference = MonaiBundleInferenceOperator(
            self, app_context=context, bundle_path=bundle, name="dose_inference",
            bundle_config_names=BundleConfigNames(config_names=["inference", "deploy"]),
            input_mapping=[IOMapping("image", Image, IOType.IN_MEMORY)],
            output_mapping=[IOMapping("pred", Image, IOType.IN_MEMORY)])
        writer = RTDoseWriterOperator(self, bundle=bundle, output_dir=Path(context.output_path), options=options,
                                      name="rtdose_writer")
        self.add_flow(loader, selector, {("dicom_study_list", "dicom_study_list")})
        self.add_flow(selector, masks, {("study_selected_series_list", "study_selected_series_list")})
        self.add_flow(masks, inference, {("image", "image")})
        self.add_flow(masks, writer, {("case", "case")})
        self.add_flow(inference, writer, {("pred", "pred")})


def find_bundle(model_path: Path) -> Path:
    """The bundle at ``model_path`` or in a folder of it; that of this code where the SDK was given no model.

    Raises:
        CaseError: when there are several.
    """
    model_path = model_path.resolve()
    candidates = [model_path, *sorted(p for p in model_path.glob("*") if p.is_dir()), Path(bundle_root()).resolve()]
    found = [path for path in dict.fromkeys(candidates) if (path / "configs" / "metadata.json").is_file()]
    if not found:
        raise CaseError(f"{model_path}: no bundle there; expected configs/metadata.json and models/model.pt. "
                        "Give the bundle's folder with -m")
    inside = [path for path in found if path.parent == model_path]
    if found[0] != model_path and len(inside) > 1:
        raise CaseError(f"{model_path}: several bundles ({', '.join(p.name for p in inside)}); give the one to use")
    return found[0]


def read_options(text: str) -> dict[str, object]:
    """Options of the prediction from JSON.

    Raises:
        CaseError: for anything but a JSON object of known options.
    """
    try:
        options = json.loads(text) if text.strip() else {}
    except json.JSONDecodeError as error:
        raise CaseError(f"{OPTIONS_VARIABLE}: not JSON ({error}); found {text!r}") from error
    if not isinstance(options, dict) or set(options) - set(OPTIONS):
        raise CaseError(f"{OPTIONS_VARIABLE}: found {text!r}; expected a JSON object with some of {', '.join(OPTIONS)}")
    return options
