"""From a case to the working grid, and with RestoreDosed back to the patient's own."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from custom.case import Beam, Case, CaseError, Grid
from custom.transforms import load
from custom.transforms.load import LoadImageRTd, WorkingGridd, to_working_grid
from custom.transforms.save import RestoreDosed

SPACING, FINEST = (3.9, 3.9, 2.5), (1.9, 1.9, 1.4)
DOSE_CENTRE_MM = np.array([12.0, -8.0, 5.0])
TILT = Rotation.from_euler("xyz", (4, -3, 6), degrees=True).as_matrix()
ORIENTATIONS = {  # columns: patient direction of the axes i, j, k
    "HFS": np.diag([1.0, 1, 1]),
    "HFP": np.diag([-1.0, -1, 1]),
    "FFS": np.diag([-1.0, 1, -1]),
    "FFP": np.diag([1.0, -1, -1]),
    "sagittal": np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]]),
    "tilted": TILT,
}


def drawn_case(shape, spacing_mm, directions=None) -> Case:
    """An ellipsoid body around the origin, a spherical target off centre, and a smooth dose with its peak there."""
    directions = np.eye(3) if directions is None else directions
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing_mm
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    grid = Grid(shape, affine)
    points = grid.to_world(np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1))
    body = (np.square(points / (60, 50, 40))).sum(-1) < 1
    distance = np.linalg.norm(points - DOSE_CENTRE_MM, axis=-1)
    dose = (60 * np.exp(-0.5 * np.square(distance / 30))).astype(np.float32)
    hu = np.where(body, points[..., 0], -1000).astype(np.float32)  # the CT tells how far left a voxel is
    masks = {"Body": body, "PTV_6000": distance < 20, "Tiny": distance < 0.8}
    beams = (Beam("G0", (0.0,), tuple(DOSE_CENTRE_MM)),)
    return Case("drawn", grid, hu, masks, {"PTV_6000": 60.0}, beams, "IMRT", "HeadNeck", dose, grid)


@pytest.fixture(scope="module")
def fine() -> Case:
    return drawn_case((112, 90, 40), (1.2, 1.3, 2.5))


# ------------------------------------------------------------------------------------------------------ working grid
def test_coarse_aligned_case_is_only_cropped():
    case = drawn_case((40, 36, 44), (3.9, 3.8, 2.5))
    work = to_working_grid(case, SPACING, FINEST, margin=2)
    start = np.rint(case.grid.to_index(work.grid.origin_mm)).astype(int)
    box = tuple(slice(a, a + n) for a, n in zip(start, work.grid.shape))
    assert work.grid.same_as(case.grid.crop(box)) and work.grid.shape < case.grid.shape
    for name, mask in case.masks.items():
        assert np.array_equal(work.masks[name], mask[box]) and mask.sum() == work.masks[name].sum()
    assert np.array_equal(work.ct_hu, case.ct_hu[box]) and np.array_equal(work.dose_gy, case.dose_gy[box])
    for axis in range(3):  # two voxels on either side
        used = np.flatnonzero(work.body.any(tuple({0, 1, 2} - {axis})))
        assert (used[0], work.grid.shape[axis] - 1 - used[-1]) == (2, 2)


def test_fine_case_is_averaged(fine):
    work = to_working_grid(fine, SPACING, FINEST)
    assert work.grid.is_axis_aligned and work.grid.spacing_mm == pytest.approx((3.9, 3.9, 2.5))
    for name in ("Body", "PTV_6000"):
        found, wanted = work.masks[name].sum() * work.grid.voxel_cc, fine.masks[name].sum() * fine.grid.voxel_cc
        assert found == pytest.approx(wanted, rel=0.02)
    assert "Tiny" not in work.masks  # too small for this grid
    assert work.prescription_gy == fine.prescription_gy and work.dose_gy.max() == pytest.approx(60, abs=1.5)


def test_averaging_keeps_half_voxel_detail_out(fine):
    """Noise on the fine CT becomes weaker, as it does in a scanner's thicker voxels, and the mean stays."""
    noise = np.random.default_rng(0).normal(0, 90, fine.grid.shape).astype(np.float32)
    work = to_working_grid(dataclasses.replace(fine, ct_hu=noise), SPACING, FINEST)
    assert work.ct_hu[work.body].std() < 40 and abs(work.ct_hu[work.body].mean()) < 3


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_every_orientation_lands_in_canonical_lps(name):
    case = drawn_case((84, 72, 60), (1.6, 1.6, 1.6), ORIENTATIONS[name])
    work = to_working_grid(case, SPACING, (1.9, 1.9, 1.9))
    assert work.grid.is_axis_aligned
    points = work.grid.to_world(np.stack(np.nonzero(work.masks["PTV_6000"]), -1))
    assert points.mean(0) == pytest.approx(DOSE_CENTRE_MM, abs=0.4)
    inner = np.square(work.grid.to_world(np.stack(np.nonzero(work.body), -1)) / (50, 40, 30)).sum(-1) < 1
    left_mm = work.grid.to_world(np.stack(np.nonzero(work.body), -1))[inner, 0]
    np.testing.assert_allclose(work.ct_hu[work.body][inner], left_mm, atol=0.5)


@pytest.mark.parametrize("name", ["HFP", "FFS", "FFP", "sagittal"])
@pytest.mark.parametrize("spacing", [(3.9, 3.9, 2.5), (2.7, 3.1, 3.3)], ids=str)
def test_coarse_flipped_grids_keep_their_voxels(name, spacing):
    """Nothing is interpolated where the voxels are coarse enough and only their order differs."""
    case = drawn_case((41, 38, 35), spacing, ORIENTATIONS[name])
    work = to_working_grid(case, SPACING, FINEST)
    at = case.grid.to_index(work.grid.to_world((0, 0, 0)))
    np.testing.assert_allclose(at, np.rint(at), atol=1e-6)
    assert work.masks["PTV_6000"].sum() == case.masks["PTV_6000"].sum()
    assert np.sort(work.dose_gy[work.body]) == pytest.approx(np.sort(case.dose_gy[case.body]))


def test_rounding_of_positions_adds_no_voxel(fine):
    """Positions such as -17.3 + 3.1 * 11 are not exact in binary; the grid must not grow, and so shift, for that."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        shape = tuple(rng.integers(4, 12, 3))
        affine = np.diag([*(np.round(rng.uniform(2, 5, 3), 3) * (1, -1, -1)), 1.0])
        affine[:3, 3] = np.round(rng.uniform(-300, 300, 3), 2)
        full = np.ones(shape, bool)
        case = dataclasses.replace(fine, grid=Grid(shape, affine), ct_hu=None, dose_gy=None,
                                   masks={"Body": full, "PTV_6000": full})
        assert to_working_grid(case, SPACING, FINEST).grid.shape == shape


def test_case_without_ct_or_dose(fine):
    work = to_working_grid(dataclasses.replace(fine, ct_hu=None, dose_gy=None), SPACING, FINEST)
    assert work.ct_hu is None and work.dose_gy is None


# ------------------------------------------------------------------------------------------------------ and back
@pytest.mark.parametrize("name", ["HFS", "FFP", "tilted"])
def test_smooth_dose_survives_the_round_trip(name):
    case = drawn_case((84, 72, 40), (1.6, 1.6, 2.4), ORIENTATIONS[name])
    data = WorkingGridd(spacing_mm=SPACING, finest_mm=FINEST)({"case": case})
    data["pred"] = torch.from_numpy(data["work"].dose_gy / 60)[None]
    found = RestoreDosed()(data)["pred"]
    assert found.shape == (1, *case.grid.shape) and "pred_std" not in data
    np.testing.assert_allclose(np.asarray(found.affine), case.grid.ras_affine)
    error = np.abs(found[0].numpy() - case.dose_gy)
    deep = ndimage.binary_erosion(case.body, iterations=3)  # the skin takes its dose from the voxels inside
    assert error[deep].max() < 1.0 and error[case.body].max() < 4.0 and error[case.body].mean() < 0.3
    assert (found[0].numpy()[~case.body] == 0).all()
    centroid = (np.stack(np.nonzero(case.body)) * found[0].numpy()[case.body]).sum(1) / found.sum().item()
    wanted = (np.stack(np.nonzero(case.body)) * case.dose_gy[case.body]).sum(1) / case.dose_gy[case.body].sum()
    assert centroid == pytest.approx(wanted, abs=0.02)  # nothing moves, not even by a fraction of a voxel


def test_exact_grid_survives_exactly():
    case = drawn_case((40, 36, 44), (3.9, 3.8, 2.5))
    data = WorkingGridd()({"case": case})
    data["pred"] = torch.from_numpy(data["work"].dose_gy / 60)[None]
    np.testing.assert_allclose(RestoreDosed()(data)["pred"][0].numpy(), case.dose_gy * case.body, atol=1e-4)


def test_restored_dose_is_clean_and_samples_give_a_deviation():
    case = drawn_case((40, 36, 44), (3.9, 3.8, 2.5))
    data = WorkingGridd()({"case": case})
    fraction = torch.full(data["work"].grid.shape, -0.5)
    out = RestoreDosed()({**data, "pred": torch.stack([fraction, fraction * 0 + 0.1])})
    assert (out["pred"] == 0).all()
    deviation = out["pred_std"][0].numpy()
    assert deviation[case.body] == pytest.approx(6.0, abs=1e-4) and (deviation[~case.body] == 0).all()
    with pytest.raises(CaseError, match="drawn.*not finite.*weights"):
        RestoreDosed()({**data, "pred": fraction[None] * np.nan})


@pytest.mark.parametrize("outside", [0.0, 3.0])
def test_skin_dose_does_not_depend_on_what_lies_outside(fine, outside):
    """What a network says of the air around the patient must not leak into the skin by interpolation."""
    data = WorkingGridd(spacing_mm=SPACING, finest_mm=FINEST)({"case": fine})
    data["pred"] = torch.from_numpy(np.where(data["work"].body, 0.5, outside).astype(np.float32))[None]
    found = RestoreDosed()(data)["pred"][0].numpy()
    np.testing.assert_allclose(found, 30.0 * fine.body, atol=1e-3)


# ------------------------------------------------------------------------------------------------------ reading
def test_reader_gets_the_options_and_those_of_the_request_win(monkeypatch, fine):
    asked = []
    monkeypatch.setattr(load, "read_case", lambda path, **options: asked.append((path, options)) or fine)
    read = LoadImageRTd(prescription_gy=66.0, technique="VMAT", roi_map={"cord": "SpinalCord"})
    out = read({"image": "folder", "technique": "IMRT", "site": None})
    assert out["case"] is fine and out["image"] == "folder"
    assert asked == [("folder", {"prescription_gy": 66.0, "technique": "IMRT", "site": None,
                                 "roi_map": {"cord": "SpinalCord"}, "default_beams": None})]
