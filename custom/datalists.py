"""Which cases of a folder are for training, and which for validation."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from pathlib import Path

from monai.data import DataLoader
from tqdm import tqdm

from custom.case import CaseError, Keys
from custom.io import find_cases

__all__ = ["bundle_root", "list_cases", "prepare", "split_cases"]

logger = logging.getLogger(__name__)


def bundle_root() -> str:
    """Folder of the bundle this code belongs to: the parent of ``custom`` in an assembled bundle, else ``bundle``."""
    here = Path(__file__).absolute().parents[1]
    return str(here if (here / "configs").is_dir() else here / "bundle")


def list_cases(dataset_dir: str | Path) -> list[dict[str, str]]:
    """All cases below ``dataset_dir`` as ``{"image": path}``."""
    return [{Keys.IMAGE: str(path)} for path in find_cases(dataset_dir)]


def split_cases(dataset_dir: str | Path, part: str, validation_share: float = 0.15,
                limit: int | None = None) -> list[dict[str, str]]:
    """Cases of one part, as ``{"image": path}``.

    OpenKBP's own folders ``train-pats`` and ``validation-pats`` decide where they are found; elsewhere a hash of the
    case's name does, so that adding cases moves none from one part to the other.

    Args:
        part: ``"train"`` or ``"validation"``.
        validation_share: share of validation cases where the folders do not tell.
        limit: at most so many cases.

    Raises:
        CaseError: the part is empty.
    """
    cases = find_cases(dataset_dir)
    folders = {f"{name}-pats" for name in ("train", "validation")}
    told = [path for path in cases if folders & set(path.parts)]
    if told:
        chosen = [path for path in told if f"{part}-pats" in path.parts]
    else:
        held = [zlib.crc32(path.name.encode()) % 1000 < 1000 * validation_share for path in cases]
        chosen = [path for path, is_held in zip(cases, held, strict=True) if is_held == (part == "validation")]
    if not chosen:
        raise CaseError(f"{dataset_dir}: found {len(cases)} cases but none for {part}; expected folders train-pats and "
                        "validation-pats, or enough cases to split")
    return [{Keys.IMAGE: str(path)} for path in chosen[:limit]]


def prepare(datasets: Sequence, num_workers: int = 2) -> None:
    """Fill the caches of persistent datasets in parallel, with a progress bar; what is cached already is only read."""
    for dataset in datasets:
        loader = DataLoader(dataset, batch_size=1, num_workers=num_workers, collate_fn=lambda batch: len(batch))
        for _ in tqdm(loader, desc="preparing cases", unit="case"):
            pass
