"""Command line: ``python -m custom.io DATASET OUT`` packs a folder of cases into small files (custom.io.packed)."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from custom.io import find_cases, read_case
from custom.io.course import case_name
from custom.io.packed import SUFFIX, write_packed

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Pack every case of a folder into ``OUT/``, in the folders it lay in; what is packed already is left alone."""
    parser = argparse.ArgumentParser(prog="python -m custom.io", description=main.__doc__)
    parser.add_argument("dataset", type=Path, help="folder of cases")
    parser.add_argument("out", type=Path, help="folder for the packed ones")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    paths = find_cases(options.dataset)
    for done, path in enumerate(paths, 1):
        inside = path.relative_to(options.dataset) if path != options.dataset else Path(path.name)
        packed = options.out / inside.parent / (case_name(path) + SUFFIX)
        if not packed.is_file():
            write_packed(read_case(path), packed)
        logger.info("%d of %d: %s, %.2f MB", done, len(paths), packed, packed.stat().st_size / 1e6)


if __name__ == "__main__":
    main()
