"""The rasteriser against polygons with a known answer and a point-in-polygon test; rt-utils beside it."""

from __future__ import annotations

import numpy as np
import pydicom
import pytest

from custom.case import CaseError, Grid
from custom.io.rtstruct import Roi, rasterise, read_rtstruct, rt_utils_mask
from tests.io.dicom_builder import Study, box, oriented_grid

GRID = Grid.axis_aligned((30, 20, 6), (1.0, 2.0, 3.0), (-5.0, 4.0, 7.0))


def roi(contours, grid=GRID, name="roi") -> Roi:
    return Roi(1, name, "", tuple(grid.to_world(c) for c in contours))


def inside(polygon, i, j) -> bool:
    """Even-odd rule by counting crossings of a ray, one point at a time."""
    odd = False
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0)):
        if (y0 <= j < y1 or y1 <= j < y0) and x0 + (j - y0) * (x1 - x0) / (y1 - y0) <= i:
            odd = not odd
    return odd


def test_star_polygons_match_point_by_point():
    rng = np.random.default_rng(3)
    for _ in range(5):
        angle = np.sort(rng.uniform(0, 2 * np.pi, 17))
        radius = rng.uniform(2, 12, 17)
        polygon = np.stack([14 + radius * np.cos(angle), 9 + 0.7 * radius * np.sin(angle), np.full(17, 2.0)], axis=1)
        mask = rasterise(roi([polygon]), GRID)
        expected = [[inside(polygon[:, :2], i, j) for j in range(20)] for i in range(30)]
        np.testing.assert_array_equal(mask[:, :, 2], expected)
        assert mask.sum() == mask[:, :, 2].sum()


def test_nested_contours_and_key_holes_are_holes():
    ring = rasterise(roi([*box((2.5, 2.5), (12.5, 12.5), [1]), *box((5.5, 5.5), (8.5, 8.5), [1])]), GRID)
    assert ring.sum() == 100 - 9 and not ring[6:9, 6:9, 1].any()
    key = np.array([[2.5, 2.5], [12.5, 2.5], [12.5, 12.5], [2.5, 12.5], [2.5, 5.5], [5.5, 5.5], [5.5, 8.5], [8.5, 8.5],
                    [8.5, 5.5], [2.5, 5.5]])
    mask = rasterise(roi([np.column_stack([key, np.full(len(key), 1.0)])]), GRID)
    np.testing.assert_array_equal(mask, ring)


def test_area_tends_to_the_polygons():
    grid = Grid.axis_aligned((400, 400, 2), (0.25, 0.25, 1.0))
    angle = np.linspace(0, 2 * np.pi, 500, endpoint=False)
    circle = np.stack([199.3 + 120.4 * np.cos(angle), 200.1 + 120.4 * np.sin(angle), np.zeros(500)], axis=1)
    assert rasterise(roi([circle], grid), grid).sum() == pytest.approx(np.pi * 120.4**2, rel=1e-3)


def test_outside_the_image_is_cut_off_and_told():
    notes: list[str] = []
    mask = rasterise(roi(box((-10.5, 2.5), (9.5, 6.5), [0, 1, 7])), GRID, notes)
    assert mask.sum() == 2 * 10 * 4 and mask[:10, 3:7, :2].all()
    assert "outside the image" in notes[0]
    with pytest.raises(CaseError, match="no voxel"):
        rasterise(roi(box((-10.5, 2.5), (-2.5, 6.5), [0])), GRID)


def test_contours_between_slices_use_the_nearest_plane():
    notes: list[str] = []
    mask = rasterise(roi([*box((2.5, 2.5), (6.5, 6.5), [1.05]), *box((2.5, 2.5), (9.5, 9.5), [1.4])]), GRID, notes)
    assert mask.sum() == 16 and mask[3:7, 3:7, 1].all() and "between the CT slices" in notes[0]
    notes.clear()
    rasterise(roi(box((2.5, 2.5), (6.5, 6.5), [0, 2, 4])), GRID, notes)
    assert "one slice in 2" in notes[0]


def test_contours_across_the_slices_are_refused():
    across = np.array([[2.0, 2.0, 0.0], [6.0, 2.0, 0.0], [6.0, 2.0, 5.0]])
    with pytest.raises(CaseError, match="spans 5.0 slices"):
        rasterise(roi([across]), GRID)


def test_points_and_empty_rois_are_absent(tmp_path):
    study = Study(tmp_path, oriented_grid())
    path = study.write_structures({"Point": [np.array([[3.0, 3.0, 3.0]])], "Empty": [],
                                   "Cord": box((4, 4), (9, 9), [2])}, kinds={"Cord": "ORGAN"})
    structures = read_rtstruct(path)
    assert [len(r.contours) for r in structures.rois] == [0, 0, 1]
    assert structures.rois[2].kind == "ORGAN" and structures.series_uids == {study.series}
    assert "Point, Empty" in structures.notes[0]


def test_rt_utils_engine_reads_the_same_place_half_a_pixel_larger(tmp_path):
    pytest.importorskip("rt_utils")
    from custom.io import read_case
    from custom.io.ct import read_ct

    study = Study(tmp_path, oriented_grid(shape=(24, 24, 6), spacing_mm=(2.0, 2.0, 3.0)))
    files = study.write_ct(np.zeros(study.grid.shape) + np.arange(6) % 2)
    contours = box((5.0, 7.0), (12.0, 10.0), range(1, 4))
    path = study.write_structures({"PTV70": contours, "Body": box((1, 1), (20, 20), range(6))})
    ds = pydicom.dcmread(path)
    ct = read_ct(files)
    for item in ds.ROIContourSequence:
        for contour in item.ContourSequence:
            k = round(float(ct.grid.to_index(np.array(contour.ContourData[:3], float))[2]))
            image = pydicom.dataset.Dataset()
            image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", ct.sop_uids[k]
            contour.ContourImageSequence = [image]
    ds.save_as(path)
    structures = read_rtstruct(path)
    theirs = rt_utils_mask(structures, structures.rois[0], ct.files, ct.grid)
    ours = rasterise(structures.rois[0], ct.grid)
    assert theirs[ours].all() and theirs.sum() == 8 * 4 * 3  # the border pixels are painted
    assert ours.sum() == 7 * 3 * 3
    case = read_case(tmp_path, mask_engine="rt_utils")
    np.testing.assert_array_equal(case.masks["PTV_7000"], theirs)
    with pytest.raises(CaseError, match="square"):
        rt_utils_mask(structures, structures.rois[0], ct.files, oriented_grid())


def test_planes_midway_between_slices_all_go_the_same_way():
    notes: list[str] = []
    mask = rasterise(roi(box((2.5, 2.5), (6.5, 6.5), [0.5, 1.5, 2.4999999, 3.5])), GRID, notes)
    assert mask.sum(axis=(0, 1)).tolist()[:5] == [0, 16, 16, 16, 16] and "0.50 slice distances" in notes[0]
