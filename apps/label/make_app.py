"""Command line: a MONAI Label app with this bundle in it, and studies for its server. Run by MONAI Label's Python.

``make_app.py app OUT`` writes ``OUT/monaibundle`` (MONAI Label's own app of that name) with the bundle in its ``model``
folder; ``make_app.py add STUDIES DICOM...`` adds DICOM studies to the folder that the server serves.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from custom.case import CaseError
from custom.engines import WeightsLoader
from custom.io import find_cases, read_case
from custom.io.nifti import write_nifti
from custom.transforms.viewer import FROM_FILES

logger = logging.getLogger("make_app")

BUNDLE = Path(__file__).resolve().parents[2] / "bundle"
NAME = "rt_ct_dose_prediction"
LEVELS = (0.2, 0.5, 0.8, 0.95, 1.0, 1.07)  # shares of the prescription: the isodoses of the report
STEPS_AND_SAMPLES = ("num_inference_steps", "num_samples")
CHOICES = {  # shown in the viewer; what is not chosen is taken from the files
    "prescription_gy": "",
    "technique": [FROM_FILES, "IMRT", "VMAT"],
    "site": [FROM_FILES, "HeadNeck", "Lung"],
    "default_beams": [FROM_FILES, "imrt9", "imrt7", "vmat1", "vmat2"],
}
OPTIONS = "displayable_configs"  # MONAI Label's name for what a viewer may change
LOADER = "custom.transforms.load.LoadImageRTd"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0].split(": ", 1)[1])
    commands = parser.add_subparsers(dest="command", required=True)
    app = commands.add_parser("app", help="write the app")
    app.add_argument("out", type=Path, help="folder for monaibundle/")
    app.add_argument("--levels", type=float, nargs="+", default=LEVELS, help="isodoses, as shares of the prescription")
    app.add_argument("--bundle", type=Path, default=BUNDLE, help="an assembled bundle; by default this repository's")
    add = commands.add_parser("add", help="add DICOM studies to the folder the server serves")
    add.add_argument("studies", type=Path, help="the server's folder of studies")
    add.add_argument("dicom", type=Path, nargs="+", help="folders with CT and RTSTRUCT; one study each, or several")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("pydicom").setLevel(logging.ERROR)
    try:
        if options.command == "app":
            logger.info("app: %s", make_app(options.out, options.bundle, options.levels))
        else:
            for folder in options.dicom:
                for volume in add_studies(options.studies, folder):
                    logger.info("study: %s", volume)
    except CaseError as error:
        parser.exit(1, f"{error}\n")


def make_app(out: Path, bundle: Path, levels: Sequence[float] = LEVELS) -> Path:
    """Write ``out/monaibundle`` with the bundle in it; a bundle that lies there is replaced.

    Raises:
        CaseError: when MONAI Label is not installed, or the weights are not those of the configured network.
    """
    source = Path(sys.prefix) / "monailabel" / "sample-apps" / "monaibundle"
    if not source.is_dir():
        raise CaseError(f"no MONAI Label in {sys.prefix}: make its environment (make label-env) and use its Python")
    app = out / "monaibundle"
    shutil.copytree(source, app, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "model", "logs"))
    model = app / "model" / NAME
    if model.is_dir():
        shutil.rmtree(model)
    shutil.copytree(bundle, model, ignore=shutil.ignore_patterns("__pycache__", "eval", "*.ts"))
    config, metadata = (json.loads((bundle / "configs" / name).read_text(encoding="utf-8"))
                        for name in ("inference.json", "metadata.json"))
    _write(model / "configs" / "inference.json", viewer_config(config, levels))
    _write(model / "configs" / "metadata.json", viewer_metadata(metadata, levels))
    _check_weights(model)
    return app


def viewer_config(config: Mapping[str, Any], levels: Sequence[float]) -> dict[str, Any]:
    """The inference config with the viewer's options, its way of naming studies, and isodose labels."""
    out = _with_options(config)
    out[OPTIONS] = {**{name: config[name] for name in STEPS_AND_SAMPLES}, **CHOICES}
    (loader,) = (t for t in out["preprocessing"]["transforms"] if t["_target_"] == LOADER)
    loader["_target_"] = "custom.transforms.viewer.LoadViewerStudyd"
    out["postprocessing"]["transforms"].append(
        {"_target_": "custom.transforms.viewer.IsodoseLabeld", "levels": list(levels)})
    return out


def _with_options(value: Any) -> Any:
    """A copy in which every reference to steps and samples goes to the viewer's options."""
    if isinstance(value, Mapping):
        return {key: _with_options(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_with_options(child) for child in value]
    if not isinstance(value, str) or not value.startswith(("@", "$")):
        return value
    pattern = rf"@({'|'.join(STEPS_AND_SAMPLES)})\b"
    changed = re.sub(pattern, rf"int(@{OPTIONS}#\1)", value)  # viewers may send "8"
    return f"${changed}" if changed != value and value.startswith("@") else changed


def viewer_metadata(metadata: Mapping[str, Any], levels: Sequence[float]) -> dict[str, Any]:
    """The metadata with isodose bands as the labels: MONAI Label names a viewer's segments by the channels."""
    out = json.loads(json.dumps(metadata))
    names = {str(k): f"isodose {100 * level:g} %" for k, level in enumerate(levels, 1)}
    out["network_data_format"]["outputs"]["pred"]["channel_def"] = {"0": "background", **names}
    return out


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def _check_weights(model: Path) -> None:
    """MONAI Label only warns of weights that do not fit; the network would then predict untrained."""
    parser = ConfigParser()
    parser.read_config(str(model / "configs" / "inference.json"))
    WeightsLoader(model / "models" / "model.pt", parser.get_parsed_content("network_def")).load()


def add_studies(studies: Path, dicom: Path) -> list[Path]:
    """Copy every case below ``dicom`` to ``studies/NAME/`` and its CT, for the viewer, to ``studies/NAME.nii.gz``.

    Raises:
        CaseError: what reading the case raises, a case that is no folder of its own, or a study of that name is there.
    """
    added = []
    for path in find_cases(dicom):
        if path.is_file():
            raise CaseError(f"{path}: expected a folder with one CT and one RTSTRUCT a study; keep the one to show")
        case = read_case(path)
        folder, volume = studies / case.name, studies / f"{case.name}.nii.gz"
        if folder.exists() or volume.exists():
            raise CaseError(f"{folder}: there is a study of this name; remove it first, or rename {path}")
        shutil.copytree(path, folder)
        write_nifti(volume, case.ct_hu, case.grid, "CT in HU")
        added.append(volume)
    return added


if __name__ == "__main__":
    main()
