"""OpenKBP's CSV layout, read and written."""

from __future__ import annotations

import numpy as np
import pytest

from custom.case import CaseError
from custom.io import find_cases, read_case, write_dose_csv


def write_patient(folder, ct=True, dose=True, **rois):
    """A patient whose structures are given by file index triples (AP, RL, SI)."""
    folder.mkdir(parents=True)

    def flat(*index):
        return int(np.ravel_multi_index(index, (128, 128, 128)))

    def mask(name, voxels):
        (folder / f"{name}.csv").write_text(",data\n" + "".join(f"{flat(*v)},\n" for v in voxels))

    (folder / "voxel_dimensions.csv").write_text("3.9\n4.1\n2.5\n")
    block = [(a, b, c) for a in range(60, 64) for b in range(50, 60) for c in range(70, 72)]
    mask("possible_dose_mask", block)
    for name, voxels in (rois or {"PTV70": block[:8], "LeftParotid": block[-3:], "SpinalCord": block[10:12]}).items():
        mask(name, voxels)
    if ct:
        values = {flat(*v): 1024.0 for v in block} | {flat(61, 52, 71): 32743.0}
        (folder / "ct.csv").write_text(",data\n" + "".join(f"{i},{v}\n" for i, v in values.items()))
    if dose:
        (folder / "dose.csv").write_text(f",data\n{flat(60, 50, 70)},70.5\n{flat(61, 52, 71)},1.25\n")


def test_layout(tmp_path):
    write_patient(tmp_path / "pt_1")
    case = read_case(tmp_path / "pt_1")
    np.testing.assert_allclose(case.grid.spacing_mm, (4.1, 3.9, 2.5))  # left, posterior, superior
    assert case.ct_hu[50, 60, 127 - 70] == 0 and case.ct_hu[52, 61, 127 - 71] == 3071 and case.ct_hu[0, 0, 0] == -1024
    assert case.dose_gy[50, 60, 57] == 70.5 and case.dose_gy[52, 61, 56] == 1.25 and case.dose_gy.sum() == 71.75
    assert set(case.masks) == {"Body", "PTV_7000", "Parotid_L", "SpinalCord"}
    assert case.masks["PTV_7000"].sum() == 8 and case.body.sum() == 80
    assert case.prescription_gy == {"PTV_7000": 70.0}
    assert [b.gantry_deg[0] for b in case.beams] == list(range(0, 360, 40))
    assert (case.name, case.technique, case.site) == ("pt_1", "IMRT", "HeadNeck")


def test_ct_and_dose_may_be_absent(tmp_path):
    write_patient(tmp_path / "pt_1", ct=False, dose=False)
    case = read_case(tmp_path / "pt_1")
    assert case.ct_hu is None and case.dose_gy is None and any("no CT" in n for n in case.source["notes"])


def test_dose_csv_round_trip(tmp_path):
    write_patient(tmp_path / "pt_1")
    body = read_case(tmp_path / "pt_1").body
    dose = np.random.default_rng(0).random(body.shape).astype(np.float32) * 70
    write_dose_csv(tmp_path / "pt_1" / "dose.csv", dose, body)
    np.testing.assert_allclose(read_case(tmp_path / "pt_1").dose_gy, np.where(body, dose, 0), rtol=1e-5)
    assert not [p for p in (tmp_path / "pt_1").iterdir() if p.name.startswith(".")]
    with pytest.raises(CaseError, match="shape"):
        write_dose_csv(tmp_path / "dose.csv", dose[1:], body)


@pytest.mark.parametrize(("file", "text", "message"), [
    ("ct.csv", "1,2\n", "header"), ("ct.csv", ",data\n9999999,1\n", "outside"), ("dose.csv", ",data\n1,x\n", "numbers"),
    ("dose.csv", ",data\n1,\n", "index,value"), ("voxel_dimensions.csv", "1\n2\n", "three voxel sizes"),
])
def test_broken_files_are_named(tmp_path, file, text, message):
    write_patient(tmp_path / "pt_1")
    (tmp_path / "pt_1" / file).write_text(text)
    with pytest.raises(CaseError, match=f"{file}.*{message}"):
        read_case(tmp_path / "pt_1")


def test_cases_are_found_in_the_unpacked_tree(tmp_path):
    for name in ("pt_3", "pt_20", "pt_1"):
        write_patient(tmp_path / "validation-pats" / name, ct=False, dose=False)
    assert [p.name for p in find_cases(tmp_path)] == ["pt_1", "pt_20", "pt_3"]
    assert find_cases(tmp_path / "validation-pats" / "pt_3") == [tmp_path / "validation-pats" / "pt_3"]


def test_real_patient_lies_as_the_axes_say(shared_dir, tmp_path):
    """Mandible in front of the cord, left parotid on the left, brainstem above the larynx."""
    source = shared_dir / "openkbp" / "cases" / "pt_201.npz"
    if not source.is_file():
        pytest.skip(f"{source} is not there")
    names = ["Brainstem", "SpinalCord", "RightParotid", "LeftParotid", "Esophagus", "Larynx", "Mandible",
             "PTV56", "PTV63", "PTV70"]
    with np.load(source) as packed:
        bits, spacing = packed["structures"], packed["voxel_mm"]
    (tmp_path / "pt").mkdir()
    np.savetxt(tmp_path / "pt" / "voxel_dimensions.csv", spacing)
    for bit, name in enumerate([*names, "possible_dose_mask"]):
        index = np.flatnonzero(bits.ravel() >> bit & 1)
        if index.size:
            (tmp_path / "pt" / f"{name}.csv").write_text(",data\n" + "".join(f"{i},\n" for i in index))
    case = read_case(tmp_path / "pt")
    centre = {n: np.argwhere(m).mean(axis=0) for n, m in case.masks.items()}
    assert centre["Bone_Mandible"][1] < centre["SpinalCord"][1]
    assert centre["Parotid_L"][0] > centre["Parotid_R"][0]
    assert centre["Brainstem"][2] > centre["Larynx"][2]
    assert case.prescription_gy == {"PTV_7000": 70.0, "PTV_6300": 63.0, "PTV_5600": 56.0}
