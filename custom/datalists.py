"""Which cases of a folder are for training, and which for validation."""

from __future__ import annotations

import logging
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from monai.data import DataLoader
from tqdm import tqdm

from custom.case import CaseError, Keys
from custom.io import find_cases
from custom.io.course import case_name
from custom.places import bundle_folder

__all__ = ["bundle_root", "is_done", "list_cases", "prepare", "split_cases"]

logger = logging.getLogger(__name__)

CASE_NAME = "case_name"


def bundle_root() -> str:
    """:func:`custom.places.bundle_folder`, as a config takes it."""
    return str(bundle_folder())


def list_cases(dataset_dir: str | Path, done_in: str | Path | None = None) -> list[dict[str, str]]:
    """All cases below ``dataset_dir`` as ``{"image": path}``.

    Cases whose names are alike get an entry ``"case_name"`` that tells them apart by the folders above them, so that
    none overwrites the results of another.

    Args:
        dataset_dir: one case or a folder of cases.
        done_in: output folder of an interrupted run; cases with a report there are left out.

    Raises:
        CaseError: there is no case, or all are done.
    """
    paths = find_cases(dataset_dir)
    found = [{Keys.IMAGE: str(path)} | ({} if name == case_name(path) else {CASE_NAME: name})
             for path, name in zip(paths, _unique_names(paths), strict=True)]
    found = [case for case in found if done_in is None or not is_done(case, done_in)]
    if done_in is not None:
        logger.info("%d of %d cases are done already", len(paths) - len(found), len(paths))
    if not found:
        raise CaseError(f"{dataset_dir}: all {len(paths)} cases have a report in {done_in}; nothing is left to do. "
                        "Give another output_dir, or leave skip_done out to predict them anew")
    return found


def is_done(case: Mapping[str, str], output_dir: str | Path) -> bool:
    """True when ``output_dir`` has a report of a case of :func:`list_cases`; it is written last, with the others."""
    name = case.get(CASE_NAME) or case_name(Path(case[Keys.IMAGE]))
    return (Path(output_dir) / name / "report.json").is_file()


def _unique_names(paths: Sequence[Path]) -> list[str]:
    """Case names; equal ones (also to a file system that ignores case) preceded by the folders that differ."""
    names = [case_name(path) for path in paths]
    for depth in range(1, max((len(path.resolve().parents) for path in paths), default=0)):
        counts = Counter(name.lower() for name in names)
        if max(counts.values(), default=0) < 2:
            break
        names = [_with_folders(path, depth) if counts[name.lower()] > 1 else name
                 for path, name in zip(paths, names, strict=True)]
    counts = Counter(name.lower() for name in names)
    return [name if counts[name.lower()] == 1 else f"{name}_{number}" for number, name in enumerate(names, 1)]


def _with_folders(path: Path, depth: int) -> str:
    """The case's name after ``depth`` folders above it, joined by underscores."""
    parts = path.resolve().parts[1:]
    above = parts[max(0, len(parts) - 1 - depth):-1]
    words = (re.sub(r"[^A-Za-z0-9+-]+", "_", part).strip("_") for part in above)
    return "_".join([*filter(None, words), case_name(path)])


def split_cases(dataset_dir: str | Path, part: str, validation_share: float = 0.15,
                limit: int | None = None, extra_dirs: Sequence[str | Path] = (), fold: int | None = None,
                folds: int = 4) -> list[dict[str, str]]:
    """Cases of one part, as ``{"image": path}``.

    OpenKBP's own folders ``train-pats`` and ``validation-pats`` decide where they are found; elsewhere a hash of the
    case's name does, so that adding cases moves none from one part to the other.

    Args:
        part: ``"train"`` or ``"validation"``.
        validation_share: share of validation cases where the folders do not tell.
        limit: at most so many cases, before the extra ones.
        extra_dirs: folders whose cases all join the training, such as synthetic ones; none joins the validation.
        fold: of the training cases, every ``folds``-th from this one on is left out, before the extra ones join; what
            is trained on the others tells how well it does on these. None leaves none out.
        folds: see there.

    Raises:
        CaseError: the part is empty, or there is no such fold.
    """
    if fold is not None and not 0 <= fold < folds:
        raise CaseError(f"fold {fold}; expected 0 to {folds - 1} of {folds} folds, or None to leave no case out")
    cases = find_cases(dataset_dir)
    extra = [path for folder in extra_dirs for path in find_cases(folder)] if part == "train" else []
    folders = {f"{name}-pats" for name in ("train", "validation")}
    told = [path for path in cases if folders & set(path.parts)]
    if told:
        chosen = [path for path in told if f"{part}-pats" in path.parts]
    else:
        held = [zlib.crc32(case_name(path).encode()) % 1000 < 1000 * validation_share for path in cases]
        chosen = [path for path, is_held in zip(cases, held, strict=True) if is_held == (part == "validation")]
    if not chosen:
        raise CaseError(f"{dataset_dir}: found {len(cases)} cases but none for {part}; expected folders train-pats and "
                        "validation-pats, or enough cases to split")
    chosen = chosen[:limit]
    if fold is not None and part == "train":
        chosen = [path for number, path in enumerate(chosen) if number % folds != fold]
    return [{Keys.IMAGE: str(path)} for path in (*chosen, *extra)]


def prepare(datasets: Sequence, num_workers: int = 2) -> None:
    """Fill the caches of persistent datasets in parallel, with a progress bar; what is cached already is only read."""
    for dataset in datasets:
        loader = DataLoader(dataset, batch_size=1, num_workers=num_workers, collate_fn=lambda batch: len(batch))
        for _ in tqdm(loader, desc="preparing cases", unit="case"):
            pass
