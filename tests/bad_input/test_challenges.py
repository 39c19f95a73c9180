"""Damaged OpenKBP folders and GDP-HMM files: one message that names the file, or the right case."""

from __future__ import annotations

import io
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from custom.case import CaseError
from custom.io import find_cases, read_case
from custom.io.npz_dict import read_npz_dict
from tests.io.test_gdp_hmm import LEVELS, SHAPE, write_plan
from tests.io.test_openkbp import write_patient

VOXEL = "1052672"  # an index within the volume


# ------------------------------------------------------------------------------------------------------ OpenKBP
def replace(name: str, text: str | bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return damage


def append(name: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with (folder / name).open("a") as file:
            file.write(text)
    return damage


def cut(name: str, size: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-size])
    return damage


def half_of_the_rows(folder: Path) -> None:
    rows = (folder / "ct.csv").read_text().splitlines(keepends=True)
    (folder / "ct.csv").write_text("".join(rows[:len(rows) // 2]))


REFUSED_FOLDERS = {
    "CT cut within a row": (cut("ct.csv", 4), "ct.csv: .*cut short"),
    "CT cut between rows": (half_of_the_rows, "ct.csv: .*of the body has no value"),
    "dose cut short": (cut("dose.csv", 2), "dose.csv: .*cut short"),
    "mask cut short": (cut("PTV70.csv", 1), "PTV70.csv: .*cut short"),
    "empty file": (replace("dose.csv", ""), "dose.csv: expected the header"),
    "binary file": (replace("dose.csv", b"\x00\xff\x13" * 50), "dose.csv: expected the header"),
    "NaN in the dose": (append("dose.csv", f"{VOXEL},nan\n"), f"dose.csv: the value at index {VOXEL}"),
    "infinite CT": (append("ct.csv", f"{VOXEL},inf\n"), "ct.csv: the value"),
    "index that is no number": (append("dose.csv", "nan,1\n"), "dose.csv: an index is no whole number"),
    "index between voxels": (append("dose.csv", "7.5,1\n"), "dose.csv: an index is no whole number"),
    "index beyond the volume": (append("PTV70.csv", "2097152,\n"), "PTV70.csv: an index lies outside"),
    "negative index": (append("PTV70.csv", "-1,\n"), "PTV70.csv: an index lies outside"),
    "voxel listed twice": (append("dose.csv", f"{VOXEL},1\n{VOXEL},2\n"), "dose.csv: .*more than once"),
    "words": (append("dose.csv", f"{VOXEL},high\n"), "dose.csv: expected numbers"),
    "a column too many": (append("dose.csv", f"{VOXEL},1,2\n"), "dose.csv: expected rows"),
    "dose beyond reason": (append("dose.csv", f"{VOXEL},7000\n"), "dose.csv: the dose ranges"),
    "negative dose": (append("dose.csv", f"{VOXEL},-7\n"), "dose.csv: the dose ranges"),
    "no voxel size": (lambda f: (f / "voxel_dimensions.csv").unlink(), "voxel_dimensions.csv: there is no such file"),
    "voxel size 0": (replace("voxel_dimensions.csv", "3.9\n0\n2.5\n"), "voxel_dimensions.csv: voxel sizes"),
    "voxel size NaN": (replace("voxel_dimensions.csv", "3.9\nnan\n2.5\n"), "voxel_dimensions.csv: voxel sizes"),
    "two voxel sizes": (replace("voxel_dimensions.csv", "3.9\n2.5\n"), "voxel_dimensions.csv: expected three"),
    "no mask of possible dose": (lambda f: (f / "possible_dose_mask.csv").unlink(), "possible_dose_mask.csv: there is"),
    "empty mask of possible dose": (replace("possible_dose_mask.csv", ",data\n"), "possible_dose_mask.csv: no voxel"),
    "target outside the mask": (append("PTV70.csv", "".join(f"{n},\n" for n in range(9))), "PTV_7000 lies outside"),
    "empty target": (replace("PTV70.csv", ",data\n"), "PTV_7000 has no voxel.*delete the file"),
    "no target": (lambda f: (f / "PTV70.csv").unlink(), "no target.*roi_map"),
    "CT without the offset": (lambda f: (f / "ct.csv").write_text(
        (f / "ct.csv").read_text().replace("1024.0", "3000.0")), "ct.csv: .*not in Hounsfield units"),
}


@pytest.fixture(scope="module")
def patient(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("openkbp") / "pt_1"
    write_patient(folder)
    return folder


@pytest.mark.parametrize("name", REFUSED_FOLDERS)
def test_openkbp_refused(patient, tmp_path, name):
    harm, message = REFUSED_FOLDERS[name]
    copy = Path(shutil.copytree(patient, tmp_path / "pt_1"))
    harm(copy)
    assert find_cases(tmp_path) == [copy], "it is tried and told, not skipped"
    with pytest.raises(CaseError, match=message) as caught:
        read_case(copy)
    assert "pt_1" in str(caught.value)


def test_openkbp_structure_without_voxels_is_absent(patient, tmp_path):
    copy = Path(shutil.copytree(patient, tmp_path / "pt_1"))
    replace("SpinalCord.csv", ",data\n")(copy)
    case = read_case(copy)
    assert "SpinalCord" not in case.masks and any("SpinalCord" in note for note in case.source["notes"])


# ------------------------------------------------------------------------------------------------------ GDP-HMM
def changed(**changes) -> Callable[[Path], None]:
    return lambda path: write_plan(path, **changes)


def shorter(share: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[:int(share * len(content))])
    return damage


def flipped_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def program(pickled: bytes) -> Callable[[Path], None]:
    """An npz whose pickle is ``pickled``."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": ()})

    def damage(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", header.getvalue() + pickled)
    return damage


def named(module: str, name: str) -> bytes:
    """A pickle (protocol 4) that names a global; dotted names reach into modules."""
    texts = b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name))
    return b"\x80\x04" + texts + b"\x93."


def bomb(path: Path) -> None:
    """20 MB of zeros in 20 kB, which declare to be 1 TB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", b"\0" * 20_000_000)
    content = path.read_bytes()
    size = (20_000_000).to_bytes(4, "little")
    path.write_bytes(content.replace(size, b"\xf0\xff\xff\xff"))


NOT_FINITE = np.where(np.arange(SHAPE[2]) == 3, np.nan, np.zeros(SHAPE, np.float32))
REFUSED_FILES = {
    "cut short": (shorter(0.7), "a.npz: .*cut short"),
    "empty": (shorter(0.0), "a.npz: .*cut short"),
    "flipped byte": (flipped_byte, "a.npz: .*damaged"),
    "NaN in the image": (changed(img=NOT_FINITE), "'img' holds values that are not finite"),
    "NaN in the dose": (changed(dose=NOT_FINITE), "'dose' holds values that are not finite"),
    "flat image": (changed(img=np.zeros((24, 28))), "'img' is float64 .*expected a 3D array"),
    "no image": (changed(img=None), "'img' is NoneType"),
    "image of words": (changed(img=np.full(SHAPE, "x")), "'img' is <U1"),
    "image that is no CT": (changed(img=np.full(SHAPE, 3000.0)), "not in Hounsfield units"),
    "mask of another shape": (changed(PTVMid=np.ones((4, 4, 4), np.uint8)), "'PTVMid' has the shape"),
    "dose of another shape": (changed(dose=np.ones((4, 4, 4))), "'dose' has the shape"),
    "dose scale NaN": (changed(dose_scale=np.nan), "dose_scale"),
    "dose beyond reason": (changed(dose_scale=7.0), "the dose ranges"),
    "voxel size 0": (changed(spacing=(0, 1, 1)), "spacing"),
    "no body": (changed(Body=None), "no Body; found"),
    "empty body": (changed(Body=np.zeros(SHAPE, np.uint8)), "no Body; found"),
    "angle NaN": (changed(angle_list=[np.nan, 0.0]), "angle_list"),
    "isocentre far away": (changed(isocenter=[0.0, 0.0, 1e6]), "mm outside the CT"),
    "zip bomb": (bomb, "a.npz: .*unfolds to|damaged|not a GDP-HMM"),
    "a list instead of a dict": (program(pickle.dumps([1, 2])), "holds a list"),
    "names os.system": (program(b"cos\nsystem\n(S'touch ran'\ntR."), "os.system"),
    "names eval": (program(named("builtins", "eval")), "builtins.eval"),
    "reaches a file writer through numpy": (program(named("numpy.dtypes", "__loader__.set_data")), "numpy.dtypes"),
    "reaches numpy.load": (program(named("numpy", "load")), "numpy.load"),
    "reserves memory by a memo entry": (program(b"\x80\x03Nr\xff\xff\xff\x7f."), "would fill the memory"),
    "reserves memory by an array": (program(b"\x80\x03cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85\x85R."), "not a GDP"),
    "instance of a class": (program(b"(S'touch ran'\nios\nsystem\n."), "INST"),
    "a pickle within itself": (program(b"\x80\x03]q\x00h\x00a."), "not a GDP-HMM file|holds a list"),
}


@pytest.mark.parametrize("name", REFUSED_FILES)
def test_gdp_hmm_refused(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    harm, message = REFUSED_FILES[name]
    path = write_plan(tmp_path / "a.npz")
    harm(path)
    assert find_cases(tmp_path) == [path]
    with pytest.raises(CaseError, match=message) as caught:
        read_case(path, prescription_gy=LEVELS)
    assert "a.npz" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"], "nothing has run"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_gives_the_same_arrays(tmp_path, protocol):
    volume = np.random.default_rng(0).random((5, 6, 7))
    content = {"c": volume, "fortran": np.asfortranarray(volume), "big": np.arange(5, dtype=">i4"), "step": volume[::2],
               "bool": volume > 0.5, "text": np.array(["ab", "c"]), "objects": np.array([1, "x"], dtype=object),
               "half": volume.astype(np.float16), "scalar": np.float32(3.5), "nested": {"k": np.uint8(3)},
               "plain": [1, 2.5, None, True, "x", (1, 2)]}
    path = tmp_path / "a.npz"
    program(pickle.dumps(np.array(content, dtype=object), protocol=protocol))(path)
    found = read_npz_dict(path)
    assert list(found) == list(content)
    for key, value in content.items():
        if isinstance(value, np.ndarray):
            assert found[key].dtype == value.dtype
            np.testing.assert_array_equal(found[key], value)
        else:
            assert found[key] == value and type(found[key]) is type(value)
