"""Command line: what MONAI Deploy's packager takes, with all it needs inside: ``make_package.py OUT``.

``OUT/app`` holds the application and the bundle's code with the data files it reads beside itself (``configs``),
``OUT/models/rt_ct_dose_prediction`` the bundle.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger("make_package")

APP = Path(__file__).resolve().parent
ROOT = APP.parents[1]
NAME = "rt_ct_dose_prediction"
UNWANTED = shutil.ignore_patterns("__pycache__", "eval", "*.ts", "make_package.py", "constraints.txt")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the folders the command line asks for; those of an earlier call are replaced."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0].split(": ", 1)[1])
    parser.add_argument("out", type=Path, help="folder for app/ and models/")
    parser.add_argument("--bundle", type=Path, default=ROOT / "bundle", help="an assembled bundle")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for source, target in ((APP, "app"), (options.bundle / "custom", "app/custom"),
                           (options.bundle / "configs", "app/configs"), (options.bundle, f"models/{NAME}")):
        folder = options.out / target
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(source, folder, ignore=UNWANTED)
        logger.info("%s", folder)


if __name__ == "__main__":
    main()
