"""Packed cases come back as they were, within the steps of their numbers, from small files without pickles."""

import io
import zipfile

import numpy as np
import pytest

from custom.case import CaseError
from custom.datalists import is_done, list_cases
from custom.io import find_cases, read_case
from custom.io.__main__ import main
from custom.io.packed import read_packed, write_packed
from custom.phantom import make_case, with_dose


@pytest.fixture(scope="module")
def case():
    case = make_case("Lung", 1, shape=(32, 24, 20), technique="VMAT")
    ramp = np.linspace(0, 70.1, case.body.size, dtype=np.float32).reshape(case.grid.shape)
    return with_dose(case, ramp * case.body)


def test_round_trip(case, tmp_path):
    write_packed(case, tmp_path / "a.packed.npz")
    back = read_case(tmp_path / "a.packed.npz")
    assert back.name == "a" and back.grid.same_as(case.grid) and back.beams == case.beams
    assert (back.technique, back.site) == (case.technique, case.site)
    assert dict(back.prescription_gy) == dict(case.prescription_gy) and list(back.masks) == list(case.masks)
    assert all(np.array_equal(back.masks[name], case.masks[name]) for name in case.masks)
    assert np.abs(back.dose_gy - case.dose_gy).max() <= 0.0251
    kept = case.ct_hu < 1016
    assert kept.mean() > 0.95 and np.abs(back.ct_hu - case.ct_hu)[kept].max() <= 4.001
    assert (back.ct_hu[~kept] == 1016).all() and back.dose_gy.dtype == np.float32
    assert [p.name for p in tmp_path.iterdir()] == ["a.packed.npz"]


def test_without_ct_and_dose(case, tmp_path):
    bare = make_case("HeadNeck", 3, shape=(24, 24, 16))
    bare = type(bare)(**{**{f: getattr(bare, f) for f in bare.__dataclass_fields__}, "ct_hu": None})
    write_packed(bare, tmp_path / "b.packed.npz")
    back = read_packed(tmp_path / "b.packed.npz")
    assert back.ct_hu is None and back.dose_gy is None


def test_command_packs_a_folder_and_keeps_its_parts(case, tmp_path):
    for part in ("train-pats", "validation-pats"):
        write_packed(case, tmp_path / "in" / part / "p.packed.npz")
    main([str(tmp_path / "in"), str(tmp_path / "out")])
    found = find_cases(tmp_path / "out")
    assert [p.parent.name for p in found] == ["train-pats", "validation-pats"]
    assert read_case(found[0]).name == "p"
    before = [p.stat().st_mtime_ns for p in found]
    main([str(tmp_path / "in"), str(tmp_path / "out")])
    assert [p.stat().st_mtime_ns for p in found] == before


def test_command_packs_cases_of_one_name_and_goes_on_after_a_bad_one(case, tmp_path):
    for name in ("p/images/one", "p/data/two", "q/three"):
        write_packed(case, tmp_path / "in" / f"{name}.packed.npz")
    twins = [tmp_path / "in" / name for name in ("one.x.packed.npz", "ONE.X.packed.npz")]
    for twin in twins:
        write_packed(case, twin)
    (tmp_path / "in" / "bad.packed.npz").write_bytes(b"PK")
    with pytest.raises(SystemExit, match="1 of 6 cases could not be packed"):
        main([str(tmp_path / "in"), str(tmp_path / "out")])
    assert len(find_cases(tmp_path / "out")) == 5


def test_a_damaged_archive_does_not_hide_the_other_cases(case, tmp_path):
    write_packed(case, tmp_path / "good.packed.npz")
    np.savez_compressed(tmp_path / "bad.npz", np.zeros(9))
    raw = bytearray((tmp_path / "bad.npz").read_bytes())
    raw[raw.rindex(b"PK\x01\x02") + 1] ^= 255
    (tmp_path / "bad.npz").write_bytes(raw)
    assert [path.name for path in find_cases(tmp_path)] == ["bad.npz", "good.packed.npz"]
    with pytest.raises(CaseError, match="bad.npz"):
        read_case(tmp_path / "bad.npz")


def test_what_was_settled_by_packing_is_not_overruled_in_silence(case, tmp_path):
    write_packed(case, tmp_path / "a.packed.npz")
    with pytest.raises(CaseError, match="a.packed.npz: .*prescription_gy, technique"):
        read_case(tmp_path / "a.packed.npz", prescription_gy=50.0, technique="IMRT")


def test_a_result_is_found_again(case, tmp_path):
    write_packed(case, tmp_path / "in" / "a.packed.npz")
    report = tmp_path / "out" / read_case(tmp_path / "in" / "a.packed.npz").name / "report.json"
    (todo,) = list_cases(tmp_path / "in", tmp_path / "out")
    assert not is_done(todo, tmp_path / "out")
    report.parent.mkdir(parents=True)
    report.write_text("{}")
    assert is_done(todo, tmp_path / "out")


def test_damaged_foreign_and_hostile_files_are_refused(case, tmp_path):
    good = tmp_path / "good.packed.npz"
    write_packed(case, good)
    for name, content in {"cut": good.read_bytes()[:-200], "text": b"no zip", "empty": b""}.items():
        path = tmp_path / f"{name}.packed.npz"
        path.write_bytes(content)
        with pytest.raises(CaseError, match=f"{name}.packed.npz: not a packed case .*anew"):
            read_case(path)
    other, pickled = io.BytesIO(), tmp_path / "pickled.packed.npz"
    np.save(other, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(pickled, "w") as archive:
        archive.writestr("header.npy", other.getvalue())
    with pytest.raises(CaseError, match="pickled.packed.npz: not a packed case .*allow_pickle"):
        read_case(pickled)
    with pytest.raises(CaseError, match="ends in .packed.npz"):
        write_packed(case, tmp_path / "x.npz")
