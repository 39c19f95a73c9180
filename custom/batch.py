"""Many cases in one run: one that fails is said and left out, the others are predicted, the run ends with an error."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from monai.data import Dataset
from monai.engines import SupervisedEvaluator

from custom.case import CaseError, OutputError
from custom.io.course import case_name

__all__ = ["BatchError", "CaseDataset", "CaseEvaluator", "Failure"]

logger = logging.getLogger(__name__)

FAILED, PATH, NAME = "failed", "path", "case_name"


class BatchError(CaseError):
    """Cases of a run that could not be done; the others were."""


@dataclass(frozen=True)
class Failure:
    """One case without a result.

    Args:
        name: name of its folder of results.
        message: what was found, what was expected and what to do.
    """

    name: str
    message: str


class CaseDataset(Dataset):
    """Dataset whose cases may fail: one that cannot be read comes as ``{"failed": Failure}`` instead of an error.

    Every item has its case's path under ``"path"``, for errors that come later.
    """

    def _transform(self, index: int) -> dict[str, Any]:
        source = self.data[index]
        path = str(source.get("image", f"case {index}"))
        about = {PATH: path, NAME: source.get("case_name") or case_name(Path(path))}
        try:
            return {**super()._transform(index), **about}
        except Exception as error:
            return {FAILED: _failure(path, about[NAME], error), **about}


class CaseEvaluator(SupervisedEvaluator):
    """MONAI's evaluator, case by case: a failure costs its own case only.

    Args:
        output_dir: folder of the results; checked before the first case, so that no minutes are lost.
        **kwargs: of :class:`monai.engines.SupervisedEvaluator`.
    """

    def __init__(self, *, output_dir: str | Path | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.failures: list[Failure] = []

    def run(self, global_epoch: int = 1) -> None:
        """Predict all cases.

        Raises:
            OutputError: the results cannot be written; what comes after that case is not tried.
            BatchError: some cases failed; raised after the others are done.
        """
        self.failures.clear()
        if self.output_dir is not None:
            _check_writable(self.output_dir)
        super().run(global_epoch)
        if self.failures:
            raise BatchError(_summary(self.failures, self.state.epoch_length))

    def _iteration(self, engine: SupervisedEvaluator, batchdata: Mapping[str, Any]) -> Any:
        failure = _unwrapped(batchdata.get(FAILED))
        if failure is None:
            try:
                return super()._iteration(engine, batchdata)
            except OutputError:
                raise
            except Exception as error:
                failure = _failure(*(str(_unwrapped(batchdata.get(key))) for key in (PATH, NAME)), error)
        failure = self._with_older_results(failure)
        self.failures.append(failure)
        if self.state.epoch_length > 1:  # a single case is told once, at the end
            logger.error("%s", failure.message)
        engine.state.output = []
        return engine.state.output


    def _with_older_results(self, failure: Failure) -> Failure:
        """Say where an earlier run's results of this case lie, lest they pass for this run's."""
        older = None if self.output_dir is None else self.output_dir / failure.name
        if older is None or not older.is_dir():
            return failure
        return replace(failure, message=f"{failure.message} (what lies in {older} is from an earlier run)")


def _unwrapped(value: Any) -> Any:
    """First of a batch of values that :func:`custom.engines.collate_cases` has wrapped."""
    first = value[0] if isinstance(value, list) else value
    return getattr(first, "value", first)


def _failure(path: str, name: str, error: Exception) -> Failure:
    """The failure of one case; an error that no reader foresaw is logged with its traceback."""
    told = _told(error)
    if told is not None:
        text = str(told)
        return Failure(name, text if path in text or Path(path).name in text else f"{path}: {text}")
    logger.debug("%s", path, exc_info=error)
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return Failure(name, f"{path}: {type(cause).__name__}: {cause}; expected a case that can be predicted. This is not "
                         "one of the faults that are known: set the log level to DEBUG for where it happened")


def _told(error: BaseException | None) -> CaseError | None:
    """The error written for the user, however deep in the chain."""
    while error is not None:
        if isinstance(error, OutputError):
            raise error
        if isinstance(error, CaseError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _check_writable(folder: Path) -> None:
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}; free space there, or choose another "
                          "output_dir") from error
    finally:
        if made and folder.is_dir():
            folder.rmdir()


def _summary(failures: list[Failure], total: int | None) -> str:
    if total == 1:
        return failures[0].message
    lines = "".join(f"\n  {number}. {failure.message}" for number, failure in enumerate(failures, 1))
    return f"{len(failures)} of {total} cases failed, the others are done:{lines}"
