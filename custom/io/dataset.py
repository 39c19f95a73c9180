"""Opens DICOM files that may be damaged or hostile: bounded, whole, and with one kind of error."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pydicom
from pydicom.config import disable_value_validation
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from custom.case import CaseError

__all__ = ["MAX_VOXELS", "check_bounds", "is_bounded", "numbers", "read_dataset", "reading"]

MAX_FILE_BYTES = 4 * 1024**3
MAX_VOXELS = 512 * 1024**2  # five times 512 x 512 x 400
DEFLATED = b"1.2.840.10008.1.2.1.99"
HEAD_BYTES = 4096
UNDEFINED_LENGTH = 0xFFFFFFFF


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong inside is the fault of the file at ``path`` and becomes a :class:`CaseError`.

    pydicom decodes values when they are asked for and raises a dozen kinds of errors on damaged ones. Its warnings of
    invalid values, which quote them, are silent here: they may hold a patient's name.
    """
    try:
        with disable_value_validation(), np.errstate(all="ignore"):
            yield
    except CaseError as error:
        if str(path) in str(error) or Path(path).name in str(error):
            raise
        raise CaseError(f"{path}: {error}") from error
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise CaseError(f"{path}: cannot be read ({type(error).__name__}: {text}); expected a whole and valid file. "
                        "Copy or export it anew") from error


def is_bounded(path: Path) -> bool:
    """False for what must not be opened: pipes and devices, files beyond 4 GiB, and deflated DICOM.

    A deflated file of a few MB can unfold to many GB.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
            return False
        with path.open("rb") as file:
            return DEFLATED not in file.read(HEAD_BYTES)
    except OSError:
        return False


def read_dataset(path: str | Path, *, stop_before_pixels: bool = False) -> Dataset:
    """Read a DICOM file that must be there in full.

    Raises:
        CaseError: for a file that is cut short, deflated, larger than 4 GiB or no regular file.
    """
    path = Path(path)
    if not is_bounded(path):
        raise CaseError(f"{path}: no regular file, deflated, or larger than {MAX_FILE_BYTES // 1024**3} GiB; expected "
                        "an ordinary DICOM file. Export it without the deflated transfer syntax")
    with reading(path):
        dataset = pydicom.dcmread(path, stop_before_pixels=stop_before_pixels, force=True)
        if "TransferSyntaxUID" not in dataset.file_meta:  # a bare data set: what pydicom found it to be
            dataset.file_meta.TransferSyntaxUID = _found_syntax(dataset)
        for tag in list(dataset.keys()):
            element = dataset.get_item(tag)
            if isinstance(element, RawDataElement) and element.length != UNDEFINED_LENGTH:
                if len(element.value or b"") != element.length:
                    raise CaseError(f"{path}: the file is cut short in {pydicom.datadict.keyword_for_tag(tag) or tag}; "
                                    "copy or export it anew")
    return dataset


def _found_syntax(dataset: Dataset) -> str:
    implicit, little = getattr(dataset, "original_encoding", None) or (
        dataset.read_implicit_vr, dataset.read_little_endian)
    if not little:
        return ExplicitVRBigEndian
    return ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian


def check_bounds(shape, path: str | Path) -> None:
    """Refuse a volume that would not fit into memory before its pixels are decoded.

    Raises:
        CaseError: for more than ``MAX_VOXELS`` voxels, or an axis without any.
    """
    count = 1
    for n in shape:
        count *= int(n)
    if min(shape) < 1 or count > MAX_VOXELS:
        raise CaseError(f"{path}: {' x '.join(str(int(n)) for n in shape)} voxels; expected at least one along each "
                        f"axis and {MAX_VOXELS} in all. Resample the image")


def numbers(dataset: Dataset, keyword: str, count: int, path: str | Path) -> np.ndarray:
    """A value of ``count`` finite numbers.

    Raises:
        CaseError: when it is absent, of another length or not finite.
    """
    value = dataset.get(keyword)
    found = np.array([] if value is None or value == "" else value, dtype=np.float64).ravel()
    if found.size != count or not np.isfinite(found).all():
        raise CaseError(f"{path}: {keyword} is {'absent' if value in (None, '') else value}; expected {count} finite "
                        "number(s). Export the file anew")
    return found
