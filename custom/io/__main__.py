"""Command line: ``python -m custom.io DATASET OUT`` packs a folder of cases into small files (custom.io.packed)."""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from custom.case import CaseError
from custom.io import find_cases, read_case
from custom.io.course import case_name
from custom.io.packed import SUFFIX, write_packed

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Pack every case of a folder into ``OUT/``, in the folders it lay in; what is packed already is left alone.

    A case that cannot be read costs itself only: what is wrong with it is told, and the exit status is 1.
    """
    parser = argparse.ArgumentParser(prog="python -m custom.io", description=main.__doc__)
    parser.add_argument("dataset", type=Path, help="folder of cases")
    parser.add_argument("out", type=Path, help="folder for the packed ones")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    paths = find_cases(options.dataset)
    places = [options.out / _inside(path, options.dataset).parent / case_name(path) for path in paths]
    counts = Counter(str(place).lower() for place in places)
    failed = 0
    for done, (path, place) in enumerate(zip(paths, places), 1):
        alone = counts[str(place).lower()] == 1  # else the folder's or file's own name, which is no other's there
        packed = place.with_name((place.name if alone else path.name) + SUFFIX)
        try:
            if not packed.is_file():
                write_packed(read_case(path), packed)
        except CaseError as error:
            failed += 1
            logger.error("%d of %d: %s", done, len(paths), error)
            continue
        logger.info("%d of %d: %s, %.2f MB", done, len(paths), packed, packed.stat().st_size / 1e6)
    if failed:
        sys.exit(f"{failed} of {len(paths)} cases could not be packed")


def _inside(path: Path, dataset: Path) -> Path:
    return path.relative_to(dataset) if path != dataset else Path(path.name)


if __name__ == "__main__":
    main()
