"""Command line: ``rt-dose-demo [OUT]`` writes a synthetic head-and-neck patient as DICOM and predicts its dose."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from monai.bundle import run

from custom.case import CaseError, Site
from custom.phantom.__main__ import DEMO_NAMES
from custom.phantom.__main__ import main as write_phantom
from custom.places import bundle_folder
from custom.runner import message_of

logger = logging.getLogger("custom.demo")

NEXT = "your own cases: python -m monai.bundle run inference --config_file {config} --dataset_dir DIR --output_dir OUT"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the patient, predict its dose, and say where the results are; 1 when that failed."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("monai", "matplotlib", "ignite"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        _demonstrate(options)
    except Exception as error:
        message = message_of(error)
        if message is None:
            raise
        logger.error("Error: %s", message)
        return 1
    return 0


def _demonstrate(options: argparse.Namespace) -> None:
    config = bundle_folder() / "configs" / "inference.json"
    if not config.is_file():
        raise CaseError(f"demo: no {config}; expected the bundle's configs there. Install the package anew from its "
                        "wheel, or run from a clone")
    studies, name = options.out / "data", DEMO_NAMES[Site.HEAD_NECK]
    shape = ["--shape", *map(str, options.shape)] if options.shape else []
    if not (studies / name).is_dir():
        studies.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=studies, prefix=".") as part:  # interrupted, it leaves no half study
            write_phantom([part, "--site", Site.HEAD_NECK, *shape])
            (Path(part) / name).rename(studies / name)
    results = options.out / "results"
    run(run_id="inference", config_file=str(config), dataset_dir=str(studies / name), output_dir=str(results))
    # Not logged: MONAI's runner sets up logging of its own and silences this logger.
    lines = [*map(str, sorted((results / name).iterdir())), NEXT.format(config=config)]
    sys.stdout.write("\n".join(lines) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rt-dose-demo", description=__doc__.split("``", 2)[2].strip())
    parser.add_argument("out", type=Path, nargs="?", default=Path("demo"), help="folder for data/ and results/")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("I", "J", "K"), help="voxels, for a smaller patient")
    return parser


if __name__ == "__main__":
    sys.exit(main())
