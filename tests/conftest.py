"""What every test may use: the folder of shared, unshippable test data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder of the public data sets beside the repository (or ``$DOSE_SHARED``); skips the test where it is absent."""
    folder = Path(os.environ.get("DOSE_SHARED") or Path(__file__).resolve().parents[1].parent / "shared")
    if not (folder / "dicom").is_dir() and not (folder / "openkbp").is_dir():
        pytest.skip(f"no shared data at {folder}; set DOSE_SHARED to the folder that holds dicom/ and openkbp/")
    return folder
