"""Files that are there whole or not at all, whenever the process that writes them is killed."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["whole_file", "write_json", "write_whole"]


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A hidden file beside ``path`` that takes its place, in one step, when the block ends without an error.

    Its name is the same every time: what a killed run left of it, the next one overwrites. Files are not forced to the
    disk; a power cut may cost the last ones.

    Args:
        path: the file to write; its folder is made when missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8, line ends as they are) whole or not at all."""
    with whole_file(path) as part, part.open("w", encoding="utf-8", newline="") as stream:
        stream.write(text)


def write_json(path: str | Path, record: Any) -> None:
    """Write a nested record as JSON, whole or not at all; null where a number is nan or infinite, which JSON lacks."""
    write_whole(path, json.dumps(_finite(record), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
