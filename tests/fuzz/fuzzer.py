"""Feeds damaged bytes to every reader.

Each input is a good file with some bytes changed, cut, repeated, moved or made extreme, or a piece of another good
file put in. A reader may give a case or raise a CaseError; anything else, a hang or too much memory is a fault, and its
input is kept.
"""

from __future__ import annotations

import logging
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from custom.case import CaseError
from custom.io import find_cases, read_case
from custom.io.ct import read_ct
from custom.io.npz_dict import read_npz_dict
from custom.io.rtdose import read_rtdose
from custom.io.rtplan import read_rtplan
from custom.io.rtstruct import rasterise, read_rtstruct
from tests.bad_input import damage
from tests.io.dicom_builder import oriented_grid
from tests.io.test_gdp_hmm import LEVELS, write_plan
from tests.io.test_openkbp import write_patient

MEMORY_BYTES = 4 * 1024**3
SECONDS_AN_INPUT = 60
EXTREMES = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0", b"-1",
            b"nan", b"1e99", b"inf", b"\\", b"65535", b"SQ", b"UN", b"OW", b"\xff"]


def mutated(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """``content`` with one change or a few."""
    data = bytearray(content)
    for _ in range(int(rng.geometric(0.5))):
        if not data:
            break
        at, length = int(rng.integers(len(data))), int(rng.integers(1, 65))
        kind = int(rng.integers(8))
        if kind == 0:
            data[at] = int(rng.integers(256))
        elif kind == 1:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            del data[at:None if rng.random() < 0.2 else at + length]
        elif kind == 3:
            data[at:at] = rng.bytes(length)
        elif kind == 4:
            data[at:at] = data[at:at + length] * int(rng.integers(1, 5))
        elif kind == 5:
            extreme = EXTREMES[int(rng.integers(len(EXTREMES)))]
            data[at:at + len(extreme)] = extreme
        elif kind == 6:
            start = int(rng.integers(len(other)))
            data[at:at + length] = other[start:start + length]
        else:  # the header, where the lengths and kinds stand, rather than the values
            data[min(at, len(data) - 1) % min(600, len(data))] = int(rng.integers(256))
    return bytes(data)


def targets(folder: Path) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """Name -> the file to damage and what reads it (or the folder it lies in)."""
    study, kbp = folder / "study", folder / "pt_1"
    damage.good_study(study)
    write_patient(kbp)
    npz = write_plan(folder / "plan.npz")
    slices = damage.slices(study)
    compressed = Path(shutil.copytree(study, folder / "compressed"))
    damage.rle(compressed)
    packed = damage.slices(compressed)
    grid = oriented_grid()

    def structures(path: Path) -> None:
        for roi in read_rtstruct(path).rois:
            rasterise(roi, grid)

    def openkbp(path: Path) -> object:
        return read_case(path.parent)

    return {
        "ct": (slices[3], lambda path: read_ct(slices)), "ct rle": (packed[3], lambda path: read_ct(packed)),
        "rtstruct": (study / "RS.dcm", structures), "rtplan": (study / "RP.dcm", read_rtplan),
        "rtdose": (study / "RD.dcm", read_rtdose), "npz dict": (npz, read_npz_dict),
        "gdp_hmm": (npz, lambda path: read_case(path, prescription_gy=LEVELS)),
        "study": (study / "RS.dcm", lambda path: [read_case(p) for p in find_cases(study)]),
        "openkbp ct": (kbp / "ct.csv", openkbp), "openkbp mask": (kbp / "PTV70.csv", openkbp),
        "openkbp voxels": (kbp / "voxel_dimensions.csv", openkbp),
    }


class Hang(BaseException):
    """An input took longer than ``SECONDS_AN_INPUT``."""


def _on_alarm(signum, frame) -> None:
    raise Hang


def fuzz(inputs: int, seed: int, keep: Path) -> dict:
    """Try ``inputs`` damaged files on each reader.

    Args:
        inputs: files a reader.
        seed: the same one gives the same files.
        keep: folder for inputs that show a fault.

    Returns:
        ``inputs`` tried, ``refused`` of them, ``faults`` and ``peak_mb``. To be called in a process of its own, whose
        memory it limits.
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGALRM, _on_alarm)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    report: dict = {"inputs": 0, "refused": 0, "faults": []}
    with tempfile.TemporaryDirectory() as folder:
        readers = targets(Path(folder))
        originals = {name: path.read_bytes() for name, (path, _) in readers.items()}
        for number, (name, (path, read)) in enumerate(readers.items()):
            rng = np.random.default_rng([seed, number])
            for _ in range(inputs if not name.startswith(("openkbp", "study")) else max(1, inputs // 5)):
                other = originals[str(rng.choice(list(originals)))]
                path.write_bytes(mutated(originals[name], other, rng))
                fault = _try(read, path)
                report["inputs"] += 1
                report["refused"] += fault == "refused"
                if fault not in (None, "refused"):
                    kept = keep / f"{name.replace(' ', '_')}_{seed}_{report['inputs']}{path.suffix}"
                    shutil.copy(path, kept)
                    report["faults"].append({"reader": name, "file": str(kept), "fault": fault})
            path.write_bytes(originals[name])
    report["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return report


def _try(read: Callable[[Path], object], path: Path) -> str | None:
    signal.alarm(SECONDS_AN_INPUT)
    try:
        read(path)
    except CaseError:
        return "refused"
    except Hang:
        return f"longer than {SECONDS_AN_INPUT} s"
    except Exception:
        return traceback.format_exc(limit=-3)
    finally:
        signal.alarm(0)
    return None
