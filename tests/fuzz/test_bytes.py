"""No damaged file makes a reader hang, crash or fill the memory; ``make fuzz`` tries many more.

``FUZZ_INPUTS`` damaged files a reader (a fifth of them for those that read whole folders), made from ``FUZZ_SEED``.
"""

from __future__ import annotations

import multiprocessing
import os

from custom.case import CaseError
from custom.io.rtstruct import read_rtstruct
from tests.bad_input.damage import good_study
from tests.fuzz.fuzzer import fuzz


def test_damaged_bytes(tmp_path_factory, capsys):
    inputs, seed = int(os.environ.get("FUZZ_INPUTS", 40)), int(os.environ.get("FUZZ_SEED", 0))
    keep = tmp_path_factory.mktemp("fuzz")
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        report = pool.apply(fuzz, (inputs, seed, keep))
    with capsys.disabled():
        print(f"\nfuzz: {report['inputs']} inputs, {report['refused']} refused, {len(report['faults'])} faults, "
              f"peak {report['peak_mb']} MB")
    assert report["faults"] == []
    assert report["inputs"] > 7 * inputs and report["refused"] > 0.3 * report["inputs"]
    assert report["peak_mb"] < 3000


def test_no_cut_loses_a_contour_in_silence(tmp_path):
    """A structure set cut anywhere is refused, or all contours are there."""
    good_study(tmp_path / "anna")
    path = tmp_path / "anna" / "RS.dcm"
    content = path.read_bytes()
    whole = [(roi.name, [c.tolist() for c in roi.contours]) for roi in read_rtstruct(path).rois]
    read = 0
    for size in range(140, len(content), 61):
        path.write_bytes(content[:size])
        try:
            found = read_rtstruct(path).rois
        except CaseError:
            continue
        read += 1
        if any(roi.contours for roi in found):  # none at all is told by the reader of the study
            assert [(roi.name, [c.tolist() for c in roi.contours]) for roi in found] == whole, size
    assert read < 0.05 * len(content) / 61
