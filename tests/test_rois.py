"""ROI names of real structure sets -> TG-263 names."""

from __future__ import annotations

import json

import pytest

from custom.case import CaseError
from custom.rois import RoiTable, assign_rois, default_table_path


@pytest.fixture(scope="module")
def table() -> RoiTable:
    return RoiTable()


@pytest.mark.parametrize(("raw", "name"), [
    ("RightParotid", "Parotid_R"), ("L Parotid", "Parotid_L"), ("parotid_lt", "Parotid_L"), ("LParotid", "Parotid_L"),
    ("Cord", "SpinalCord"), ("SPINAL CORD", "SpinalCord"), ("SpinalCord", "SpinalCord"), ("BRAIN STEM", "Brainstem"),
    ("Mandible", "Bone_Mandible"), ("oesophagus", "Esophagus"), ("Larynx", "Larynx"), ("Left_Cochlear", "Cochlea_L"),
    ("LUNG_RIGHT", "Lung_R"), ("common lung", "Lungs"), ("Lungs", "Lungs"), ("Lt Lung", "Lung_L"), ("HEART", "Heart"),
    ("External ROI_1", "Body"), ("BODY", "Body"), ("Nerf optique D", "OpticNrv_R"), ("œil gauche", "Eye_L"),
    ("Chiasim", "OpticChiasm"), ("Chiasm", "OpticChiasm"), ("Glnd_Submand_R", "Glnd_Submand_R"), ("SVs", "SeminalVes"),
    ("OralCavity", "Cavity_Oral"), ("Lt_Fem_Head", "Femur_Head_L"), ("lens r", "Lens_R"), ("LAD", "A_LAD"),
])
def test_organs(table, raw, name):
    match = table.match(raw)
    assert (match.name, match.is_helper, match.is_target) == (name, False, False)


@pytest.mark.parametrize(("raw", "name", "dose_gy"), [
    ("PTV70", "PTV_7000", 70), ("PTV_70", "PTV_7000", 70), ("PTV 50.4", "PTV_5040", 50.4),
    ("PTV4140", "PTV_4140", 41.4), ("PTV_41.4", "PTV_4140", 41.4), ("PTV_7000", "PTV_7000", 70),
    ("PTV_48_6Gy", "PTV_4860", 48.6),
    ("PTV_70cf", "PTV_7000", 70), ("ptv 54 Gy", "PTV_5400", 54), ("PTV_Liver_2000x3", "PTV_6000", 60),
    ("PTV_1", "PTV_1", None), ("PTV_5", "PTV_5", None), ("PTV", "PTV", None), ("PTV_High", "PTV_High", None),
    ("PTVHigh", "PTV_High", None), ("GTV-1", "GTV_1", None), ("ctv 63", "CTV_6300", 63), ("gtv", "GTV", None),
])
def test_targets_and_their_dose(table, raw, name, dose_gy):
    match = table.match(raw)
    assert match.is_target and not match.is_helper
    assert (match.name, match.dose_gy) == (name, pytest.approx(dose_gy))


@pytest.mark.parametrize(("raw", "organ"), [
    ("Cord +0.3cm", "SpinalCord"), ("L PAROTID PRV", "Parotid_L"), ("Larynx-PTV", "Larynx"), ("BRAIN - PTV", "Brain"),
    ("SpinalCord_05", "SpinalCord"), ("Total Lung-GTV", "Lungs"), ("External -0.5cm", "Body"), ("Ring 56", None),
    ("copy of cord", None), ("zRing", None), ("Anus_NotPTV", None), ("Big Ring", None), ("couch", None),
    ("PTV_TOT_EVAL", "PTV_TOT"), ("SPTV 70", "PTV_7000"), ("ctv 70 sub", "CTV_7000"), ("PTVHighOPT", "PTV_High"),
])
def test_planning_aids_do_not_stand_for_the_organ(table, raw, organ):
    match = table.match(raw)
    assert match.is_helper
    if organ:
        assert match.name == organ


@pytest.mark.parametrize("raw", ["mid line structures", "Areola", "D1", "ROI-1", "TargetVolume", "lung", "100%"])
def test_unknown_names_stay_unknown(table, raw):
    assert table.match(raw).name is None


def test_assignment_lists_everything_it_leaves_out():
    names = ["Cord", "Cord +0.3cm", "PTV 70", "SPTV 70", "midline", "L PAROTID PRV"]
    rois = assign_rois(names)
    assert rois.index == {"SpinalCord": 0, "PTV_7000": 2}
    notes = "\n".join(rois.notes)
    for left_out in ("Cord +0.3cm", "SPTV 70", "midline", "L PAROTID PRV"):
        assert left_out in notes
    assert "Parotid_L is absent" in notes


def test_closest_of_two_candidates_wins_and_is_told():
    rois = assign_rois(["PTV67_sg", "PTV_67Gy", "Heart", "coeur"])
    assert rois.index == {"PTV_6700": 1, "Heart": 2}
    assert sum("several candidates" in note for note in rois.notes) == 2


def test_equally_close_targets_are_all_kept():
    rois = assign_rois(["PTV70_a", "PTV70_b"])
    assert rois.index == {"PTV_7000": 0, "PTV_7000_2": 1}
    assert rois.dose_gy == {"PTV_7000": 70.0, "PTV_7000_2": 70.0}


def test_same_target_name_twice_is_refused():
    with pytest.raises(CaseError, match="same name 'PTV70'"):
        assign_rois(["PTV70", "PTV70"])


def test_user_map_wins():
    names = ["Cord", "my cord", "L PAROTID PRV", "Tumor Bed", "Heart"]
    rois = assign_rois(names,
                       roi_map={"MY CORD": "SpinalCord", "L PAROTID PRV": "Parotid_L",
                                       "Tumor Bed": "PTV_5000", "Heart": None})
    assert rois.index == {"SpinalCord": 1, "Parotid_L": 2, "PTV_5000": 3}
    assert rois.dose_gy == {"PTV_5000": 50.0}
    assert any("not used: Cord" in note for note in rois.notes)


def test_derived_target_stands_in_when_there_is_no_plain_one():
    rois = assign_rois(["PTV_EVAL", "Body"])
    assert rois.index["PTV"] == 0 and any("derived" in note for note in rois.notes)


def test_own_table(tmp_path):
    path = tmp_path / "aliases.json"
    path.write_text(json.dumps({"rows": [{"name": "Heart", "match": ["pump"]}]}))
    assert RoiTable(path).match("Pump").name == "Heart"
    path.write_text("{}")
    with pytest.raises(CaseError, match="alias table"):
        RoiTable(path)


def test_table_has_one_row_a_line():
    lines = default_table_path().read_text().splitlines()
    rows = [line for line in lines if line.startswith('{"')]
    assert len(rows) == len(json.loads("\n".join(lines))["rows"])
