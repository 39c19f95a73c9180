"""Synthetic patients: anatomy with known properties, and DICOM studies that give every voxel back."""

import dataclasses
import hashlib
import importlib
import shutil
import subprocess

import numpy as np
import pydicom
import pytest
from scipy import ndimage
from skimage.measure import grid_points_in_poly

from custom import io
from custom.case import BODY, Beam, CaseError, Grid, Site, Technique
from custom.phantom import make_case, with_dose, write_study
from custom.phantom.headers import number
from custom.phantom.leaves import LEAF_BOUNDARIES_MM, conform, deliver_arc, deliver_field, sliding_window
from custom.phantom.shapes import margin
from custom.physics.fluence import Plan

COARSE = (48, 48, 24)
EXPECTED = {
    Site.HEAD_NECK: {
        "Bone_Mandible", "Brainstem", "Cavity_Oral", "Esophagus", "GTV", "Larynx", "PTV_5600", "PTV_7000", "Parotid_L",
        "Parotid_R", "SpinalCord", BODY,
    },
    Site.LUNG: {"Esophagus", "GTV", "Heart", "Lung_L", "Lung_R", "PTV_6000", "SpinalCord", BODY},
}  # fmt: skip


def centroid_mm(case, name):
    return case.grid.to_world(np.argwhere(case.masks[name]).mean(axis=0))


@pytest.fixture(scope="module")
def head_neck():
    return make_case(Site.HEAD_NECK, 3, shape=COARSE)


@pytest.fixture(scope="module")
def lung():
    return make_case(Site.LUNG, 1, shape=COARSE)


# ------------------------------------------------------------------------------------------------------ anatomy
@pytest.mark.parametrize("site", EXPECTED)
@pytest.mark.parametrize("seed", range(8))
def test_every_patient_is_complete(site, seed):
    case = make_case(site, seed, shape=COARSE)
    assert set(case.masks) == EXPECTED[site]
    assert all(mask.any() for mask in case.masks.values())
    assert not any((mask & ~case.body).any() for mask in case.masks.values())
    assert np.sum([case.masks[name] for name in case.prescription_gy], axis=0).max() == 1  # targets are disjoint
    covered = case.target_mask()[case.masks["GTV"]].mean()
    assert covered > 0.8  # the rest lies under the skin or beside the cord
    assert (case.ct_hu == np.rint(case.ct_hu)).all() and case.ct_hu.min() >= -1000


@pytest.mark.parametrize("site", EXPECTED)
def test_a_seed_fixes_the_patient(site):
    one, again, other = (make_case(site, seed, shape=COARSE) for seed in (5, 5, 6))
    assert np.array_equal(one.ct_hu, again.ct_hu) and one.beams == again.beams
    assert all(np.array_equal(one.masks[name], again.masks[name]) for name in one.masks)
    assert not np.array_equal(one.ct_hu, other.ct_hu)


@pytest.mark.parametrize("site", EXPECTED)
def test_resolution_does_not_change_the_patient(site):
    coarse, fine = make_case(site, 3, shape=COARSE), make_case(site, 3, shape=(96, 96, 48))
    for name in (BODY, *coarse.prescription_gy):
        assert np.abs(centroid_mm(coarse, name) - centroid_mm(fine, name)).max() < coarse.grid.spacing_mm.max() / 2
    volume = [case.body.sum() * case.grid.voxel_cc for case in (coarse, fine)]
    assert volume[0] == pytest.approx(volume[1], rel=0.02)


def test_anatomy_is_the_right_way_round(head_neck, lung):
    left, right = centroid_mm(head_neck, "Parotid_L"), centroid_mm(head_neck, "Parotid_R")
    assert left[0] > 40 and right[0] < -40
    assert centroid_mm(lung, "Lung_L")[0] > 40 and centroid_mm(lung, "Lung_R")[0] < -40
    assert centroid_mm(lung, "Heart")[0] > 5  # on the left
    assert centroid_mm(head_neck, "Brainstem")[2] > centroid_mm(head_neck, "SpinalCord")[2] + 50
    assert centroid_mm(head_neck, "SpinalCord")[1] > centroid_mm(head_neck, "Larynx")[1] + 20  # posterior
    assert centroid_mm(head_neck, "Bone_Mandible")[1] < -20  # anterior


def test_tissues_have_their_density():
    case = make_case(Site.LUNG, 1, shape=(96, 96, 48))
    assert -900 < np.median(case.ct_hu[case.masks["Lung_L"]]) < -650
    assert 30 < np.median(case.ct_hu[case.masks["Heart"]]) < 60
    assert np.median(case.ct_hu[~case.body]) == pytest.approx(-1000, abs=15)
    quiet = make_case(Site.LUNG, 1, shape=(96, 96, 48), noise_hu=0.0)
    inside = margin(case.masks["Heart"], -12.0, case.grid.spacing_mm)
    assert (case.ct_hu - quiet.ct_hu)[inside].std() == pytest.approx(12.0, rel=0.15)


def test_beams_and_prescriptions(head_neck, lung):
    assert head_neck.technique == Technique.IMRT and head_neck.prescription_gy == {"PTV_7000": 70.0, "PTV_5600": 56.0}
    assert [beam.gantry_deg for beam in head_neck.beams] == [(40.0 * n,) for n in range(9)]
    target = head_neck.grid.to_world(np.argwhere(head_neck.target_mask()).mean(axis=0))
    assert np.abs(target - head_neck.beams[0].isocenter_mm).max() <= 0.5

    assert lung.technique == Technique.VMAT and lung.prescription_gy == {"PTV_6000": 60.0}
    for seed in range(6):  # arcs stay on the tumour's side: 90 degrees is the patient's left
        case = make_case(Site.LUNG, seed, shape=COARSE)
        (arc,) = case.beams
        sideways = np.sin(np.deg2rad(arc.gantry_deg)).mean()
        assert arc.is_arc and np.sign(sideways) == np.sign(centroid_mm(case, "PTV_6000")[0])
    assert len(make_case(Site.LUNG, 1, shape=COARSE, technique=Technique.IMRT).beams) == 7
    (full,) = make_case(Site.HEAD_NECK, 1, shape=COARSE, technique=Technique.VMAT).beams
    assert full.is_arc and np.ptp(np.unwrap(np.deg2rad(full.gantry_deg))) > np.deg2rad(340)


def test_shape_and_spacing():
    kept = make_case(Site.HEAD_NECK, 0, shape=(64, 32, 16)).grid
    assert kept.shape == (64, 32, 16) and kept.spacing_mm == pytest.approx((8, 16, 20))
    assert make_case(Site.LUNG, 0, spacing_mm=(8, 8, 10)).grid.shape == (64, 64, 30)
    given = make_case(Site.LUNG, 0, shape=(50, 40, 20), spacing_mm=(9, 10, 12)).grid
    assert given.shape == (50, 40, 20) and given.spacing_mm == pytest.approx((9, 10, 12))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"site": "Prostate"}, "expected one of"),
        ({"site": Site.LUNG, "technique": "protons"}, "expected 'IMRT' or 'VMAT'"),
        ({"site": Site.HEAD_NECK, "shape": (8, 8, 8), "spacing_mm": (4, 4, 4)}, "finer or larger grid"),
    ],
)
def test_errors_say_what_to_do(arguments, message):
    with pytest.raises(CaseError, match=message):
        make_case(seed=0, **arguments)


def test_margin_counts_from_the_surface():
    mask = np.zeros((21, 21, 11), bool)
    mask[8:13, 8:13, 4:7] = True  # 10 x 10 x 6 mm of 2 mm voxels
    grown, shrunk = margin(mask, 4.0, (2, 2, 2)), margin(mask, -2.0, (2, 2, 2))
    assert grown[6, 10, 5] and not grown[5, 10, 5] and grown[10, 10, 2] and not grown[10, 10, 1]
    assert np.argwhere(shrunk).min(axis=0).tolist() == [9, 9, 5] and shrunk.sum() == 9
    at_edge = np.ones((4, 4, 4), bool)
    assert margin(at_edge, -1.0, (2, 2, 2)).sum() == 8 and margin(at_edge, 5.0, (2, 2, 2)).all()


# ------------------------------------------------------------------------------------------------------ leaves
def open_time(meterset, x1, x2, u_mm):
    """Monitor units during which each point lies between the leaves, from finely interpolated control points."""
    mu = np.linspace(0, meterset[-1], 4001)
    ends = [np.stack([np.interp(mu, meterset, x[:, p]) for p in range(x.shape[1])], 1) for x in (x1, x2)]
    inside = (ends[0][:, None] <= u_mm[None, :, None]) & (u_mm[None, :, None] <= ends[1][:, None])
    return inside.mean(axis=0) * meterset[-1]


@pytest.mark.parametrize("backwards", [False, True])
def test_sliding_window_delivers_the_fluence(backwards):
    u = np.arange(-30.0, 31.0, 5.0)
    wanted = np.stack((20 + 10 * np.sin(u / 9), np.where(u < 0, 5.0, 30.0), 0 * u), axis=1)
    total, x1, x2 = sliding_window(wanted, u, 400, backwards=backwards)
    assert (x1 <= x2).all() and (np.diff(x1, axis=0) * (-1 if backwards else 1) >= 0).all()
    assert (x1[:, 2] == x2[:, 2]).all()  # nothing wanted: closed
    delivered = open_time(np.linspace(0, total, 400), x1, x2, u)
    assert np.abs(delivered - wanted).max() < 0.3


def test_field_and_arc_follow_the_lattice():
    u, w = np.arange(-20.0, 21.0, 5.0), np.arange(-17.5, 20.0, 5.0)
    fluence = np.ones((u.size, w.size)) * np.linspace(1, 2, w.size)
    field = deliver_field(fluence, u, w, 40.0, fractions=10)
    assert field.jaws_mm() == ((-22.5, 22.5), (-20.0, 20.0))
    centre = (LEAF_BOUNDARIES_MM[:-1] + LEAF_BOUNDARIES_MM[1:]) / 2
    delivered = open_time(field.meterset, field.x1_mm, field.x2_mm, np.array([0.0]))[0]
    assert delivered[np.abs(centre) < 20] == pytest.approx(10 * np.linspace(1, 2, w.size), abs=0.4)
    assert (delivered[np.abs(centre) > 20] < 0.01).all()

    arc = deliver_arc([fluence] * 3, [u] * 3, [w] * 3, [350.0, 0.0, 10.0], fractions=10)
    assert (np.diff(arc.gantry_deg) > 0).all() and arc.gantry_deg[[0, -1]] == pytest.approx((345.25, 374.75))
    assert (np.diff(arc.meterset) >= 0).all() and arc.meterset[-1] == pytest.approx(3 * field.meterset[-1], rel=1e-6)


def test_apertures_look_from_the_right_side(head_neck):
    """A target to the patient's left lies at +X from the front, at -X from the back; posterior is +X from the left."""
    masks = {name: np.zeros(COARSE, bool) for name in (BODY, "PTV_7000")}
    masks[BODY][:] = masks["PTV_7000"][30, 24, 12] = True
    grid = Grid.axis_aligned(COARSE, (4, 4, 4), (-96, -96, -48))  # the target is 24 mm left of the origin
    case = type(head_neck)("one", grid, None, masks, {"PTV_7000": 70.0}, head_neck.beams, "IMRT", Site.HEAD_NECK)
    for gantry, middle in ((0.0, 24.0), (180.0, -24.0), (90.0, 0.0)):
        (x1, x2), (y1, y2) = conform(case, Beam("G", (gantry,), (0.0, 0.0, 0.0)), 2.0).jaws_mm()
        assert (x1 + x2) / 2 == pytest.approx(middle, abs=0.1) and x2 - x1 == pytest.approx(14, abs=0.1)
        assert (y1, y2) == (-10.0, 10.0)
    posterior = Beam("G", (90.0,), (24.0, -10.0, 0.0))  # the target is 10 mm behind this isocentre
    (x1, x2), _ = conform(case, posterior, 2.0).jaws_mm()
    assert (x1 + x2) / 2 == pytest.approx(10, abs=0.1)


# ------------------------------------------------------------------------------------------------------ DICOM
def drawn_plan(case, rng):
    """Any plan will do here: a dose that falls off around the target, and random smooth fluence for every angle."""
    distance = ndimage.distance_transform_edt(~case.target_mask(), sampling=case.grid.spacing_mm)
    dose = (case.highest_prescription_gy * np.exp(-((distance / 40) ** 2)) * case.body).astype(np.float32)
    angles = [angle for beam in case.beams for angle in beam.gantry_deg]
    u, w = np.arange(-45.0, 46.0, 5.0), np.arange(-57.5, 60.0, 5.0)
    fluences = [2 + ndimage.gaussian_filter(rng.normal(size=(u.size, w.size)), 2) * 5 for _ in angles]
    fluences = [np.maximum(fluence, 0).astype(np.float32) for fluence in fluences]
    return Plan(dose, fluences, [u] * len(angles), [w] * len(angles), angles)


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """Two written studies with doses: nine sliding-window fields on an anisotropic, non-square grid; one arc."""
    root, rng, out = tmp_path_factory.mktemp("studies"), np.random.default_rng(0), {}
    for site, shape, spacing in ((Site.HEAD_NECK, (56, 44, 20), (8.0, 10.5, 15.3)), (Site.LUNG, (40, 40, 20), None)):
        case = make_case(site, 2, shape=shape, spacing_mm=spacing)
        plan = drawn_plan(case, rng)
        case = with_dose(case, plan.dose_gy)
        out[site] = case, write_study(case, root / site, patient_id=site.upper(), fluence=plan), plan
    return out


def read_masks(folder, case):
    """A pixel-centre reader, written here only: parity of the closed contours of each slice."""
    ds = pydicom.dcmread(folder / "RTSTRUCT.dcm")
    names = {roi.ROINumber: roi.ROIName for roi in ds.StructureSetROISequence}
    masks = {name: np.zeros(case.grid.shape, bool) for name in names.values()}
    for roi in ds.ROIContourSequence:
        for contour in roi.ContourSequence:
            index = case.grid.to_index(np.reshape(contour.ContourData, (-1, 3)).astype(float))
            k = int(round(index[0, 2]))
            masks[names[roi.ReferencedROINumber]][:, :, k] ^= grid_points_in_poly(case.grid.shape[:2], index[:, :2])
    return masks


@pytest.mark.parametrize("site", EXPECTED)
def test_study_holds_the_case_exactly(studies, site):
    case, folder, _ = studies[site]
    for k, path in enumerate(sorted((folder / "CT").iterdir())):
        ds = pydicom.dcmread(path)
        hu = ds.pixel_array.T * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        assert np.array_equal(hu, case.ct_hu[:, :, k])
        assert np.array(ds.ImagePositionPatient, float) == pytest.approx(case.grid.to_world((0, 0, k)), abs=1e-3)
        assert np.array(ds.PixelSpacing, float) == pytest.approx(case.grid.spacing_mm[[1, 0]])
    masks = read_masks(folder, case)
    assert set(masks) == set(case.masks)
    assert [name for name in masks if not np.array_equal(masks[name], case.masks[name])] == []


@pytest.mark.parametrize("site", EXPECTED)
def test_read_case_gives_the_case_back(studies, site):
    case, folder, _ = studies[site]
    found = io.read_case(folder)
    assert np.array_equal(found.ct_hu, case.ct_hu) and found.grid.same_as(case.grid, 1e-2)
    assert [name for name in case.masks if not np.array_equal(found.masks[name], case.masks[name])] == []
    assert dict(found.prescription_gy) == dict(case.prescription_gy)
    assert (found.technique, found.site) == (case.technique, case.site)
    assert len(found.beams) == len(case.beams)
    for ours, theirs in zip(case.beams, found.beams):
        assert theirs.isocenter_mm == pytest.approx(ours.isocenter_mm)
        assert theirs.is_arc == ours.is_arc
    kept = case.dose_gy > 0.02 * case.dose_gy.max()
    assert np.abs(found.dose_gy - case.dose_gy)[kept].max() < 0.01


@pytest.mark.parametrize("site", EXPECTED)
def test_dose_is_cropped_and_exact_to_half_a_step(studies, site):
    case, folder, _ = studies[site]
    ds = pydicom.dcmread(folder / "RTDOSE.dcm")
    dose = ds.pixel_array.transpose(2, 1, 0) * float(ds.DoseGridScaling)
    origin = np.array(ds.ImagePositionPatient, float)
    start = np.rint(case.grid.to_index(origin)).astype(int)
    box = tuple(slice(a, a + n) for a, n in zip(start, dose.shape))
    assert np.abs(dose - case.dose_gy[box]).max() <= 0.51 * float(ds.DoseGridScaling)
    outside = case.dose_gy.copy()
    outside[box] = 0
    assert outside.max() <= 0.01 * case.dose_gy.max() and dose.size < case.dose_gy.size
    assert case.grid.to_world(start) == pytest.approx(origin, abs=1e-3)


def test_plan_has_its_prescriptions_beams_and_leaves(studies):
    case, folder, plan = studies[Site.HEAD_NECK]
    ds = pydicom.dcmread(folder / "RTPLAN.dcm")
    rois = {r.ROINumber: r.ROIName for r in pydicom.dcmread(folder / "RTSTRUCT.dcm").StructureSetROISequence}
    given = {rois[r.ReferencedROINumber]: float(r.TargetPrescriptionDose) for r in ds.DoseReferenceSequence}
    assert given == case.prescription_gy
    assert ds.FractionGroupSequence[0].NumberOfFractionsPlanned == 35
    for beam, direction in zip(ds.BeamSequence, range(9), strict=True):
        points = beam.ControlPointSequence
        assert float(points[0].GantryAngle) == 40.0 * direction and beam.BeamType == "DYNAMIC"
        assert [float(points[n].CumulativeMetersetWeight) for n in (0, -1)] == [0.0, 1.0]
        leaves = np.array([p.BeamLimitingDevicePositionSequence[-1].LeafJawPositions for p in points], float)
        x1, x2 = leaves[:, :60], leaves[:, 60:]
        assert (x1 <= x2).all()
        meterset = np.linspace(0, float(ds.FractionGroupSequence[0].ReferencedBeamSequence[direction].BeamMeterset), 40)
        centres = (LEAF_BOUNDARIES_MM[:-1] + LEAF_BOUNDARIES_MM[1:]) / 2
        u, w = plan.u_mm[direction], plan.w_mm[direction]
        delivered = open_time(meterset, x1, x2, u) * 35 / 100
        nearest = np.abs(w[None] - centres[:, None]).argmin(1)
        inside = (np.abs(centres) < 100) & (centres > w[0]) & (centres < w[-1])
        wanted = plan.fluences[direction][:, nearest[inside]]
        assert np.corrcoef(delivered[:, inside].ravel(), wanted.ravel())[0, 1] > 0.97


def test_arc_turns_steadily(studies):
    case, folder, _ = studies[Site.LUNG]
    (beam,) = pydicom.dcmread(folder / "RTPLAN.dcm").BeamSequence
    points = beam.ControlPointSequence
    angles = np.unwrap(np.deg2rad([float(p.GantryAngle) for p in points]))
    assert (np.diff(angles) > 0).all() and np.rad2deg(np.ptp(angles)) == pytest.approx(200, abs=2)
    assert {p.GantryRotationDirection for p in points[:-1]} == {"CW"}
    assert (np.diff([float(p.CumulativeMetersetWeight) for p in points]) >= 0).all()


def test_files_repeat_byte_for_byte(tmp_path):
    case = make_case(Site.LUNG, 0, shape=(40, 40, 12))

    def digests(folder):
        write_study(case, folder, patient_id="TWICE")
        return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.dcm")}

    first = digests(tmp_path / "a")
    assert first == digests(tmp_path / "b") and len(first) == 12 + 2  # no dose, no RTDOSE
    (tmp_path / "b" / "RTDOSE.dcm").touch()  # of an earlier call for a longer patient with a dose
    (tmp_path / "b" / "CT" / "CT_013.dcm").touch()
    assert digests(tmp_path / "b") == first


def test_objects_refer_to_each_other(studies):
    for _, folder, _ in studies.values():
        paths = [min((folder / "CT").iterdir()), *(folder / f"RT{kind}.dcm" for kind in ("STRUCT", "PLAN", "DOSE"))]
        ct, rs, rp, rd = (pydicom.dcmread(path) for path in paths)
        assert len({str(ds.StudyInstanceUID) for ds in (ct, rs, rp, rd)}) == 1
        assert len({str(ds.FrameOfReferenceUID) for ds in (ct, rs, rp, rd)}) == 1
        assert len({str(ds.SeriesInstanceUID) for ds in (ct, rs, rp, rd)}) == 4
        assert rp.ReferencedStructureSetSequence[0].ReferencedSOPInstanceUID == rs.SOPInstanceUID
        assert rd.ReferencedRTPlanSequence[0].ReferencedSOPInstanceUID == rp.SOPInstanceUID


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (dicom3tools) is not installed")
def test_dciodvfy_finds_no_error(studies, lung, tmp_path):
    folders = [folder for _, folder, _ in studies.values()]
    folders.append(write_study(lung, tmp_path / "conformal", patient_id="CONFORMAL"))
    for folder in folders:
        for path in (min((folder / "CT").iterdir()), *folder.glob("*.dcm")):
            found = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True, check=False)
            assert [line for line in (found.stdout + found.stderr).splitlines() if line.startswith("Error")] == []


def test_writer_refuses_what_it_cannot_keep(head_neck, tmp_path):
    with pytest.raises(CaseError, match="patient id"):
        write_study(head_neck, tmp_path, patient_id="much too long for DICOM")
    turn = np.array([[0.8, -0.6, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    tilted = dataclasses.replace(head_neck, grid=Grid(COARSE, head_neck.grid.affine @ turn))
    with pytest.raises(CaseError, match="axis-aligned"):
        write_study(tilted, tmp_path, patient_id="X")


@pytest.mark.parametrize(("value", "text"), [(-0.0001, "0"), (4.0, "4"), (10.6667, "10.667"), (-120, "-120")])
def test_numbers_are_short_decimal_strings(value, text):
    assert number(value) == text


def test_command_line(tmp_path, monkeypatch):
    command = importlib.import_module("custom.phantom.__main__")
    shape = ["--shape", "40", "40", "16"]
    command.main([str(tmp_path), "--site", Site.LUNG, "--seeds", "7", "--no-dose", *shape])
    assert not (tmp_path / "lung_0007" / "RTDOSE.dcm").exists()
    (arc,) = pydicom.dcmread(tmp_path / "lung_0007" / "RTPLAN.dcm").BeamSequence
    assert arc.NumberOfControlPoints == 24  # leaves fitted to the target, one shape an angle

    monkeypatch.setattr(command, "ITERATIONS", 2)
    monkeypatch.setattr(command, "BEAMLET_MM", 15.0)
    command.main([str(tmp_path), "--site", Site.HEAD_NECK, *shape])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hn_demo", "lung_0007"]
    dose = pydicom.dcmread(tmp_path / "hn_demo" / "RTDOSE.dcm")
    assert 70 < dose.pixel_array.max() * dose.DoseGridScaling < 120  # normalised to the prescription
