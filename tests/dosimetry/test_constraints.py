"""Constraint rows: the shipped table, bad rows, derived structures, verdicts."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from custom.case import BODY, Beam, Case, CaseError, Grid
from custom.dosimetry.constraints import check, compliance, load_constraints
from custom.dosimetry.regions import regions, whole_mask

ROW = {
    "structure": "SpinalCord",
    "metric": "Max[Gy]",
    "direction": "<=",
    "limit": 45,
    "weight": 1.0,
    "site": "any",
    "source": "test",
}


def write(path, *rows):
    path.write_text('{\n"constraints": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]\n}\n")
    return path


def load(path, **changes):
    return load_constraints(write(path / "rows.json", ROW | changes))


@pytest.fixture
def case():
    """A 1 x 1 x 2 mm box body with two target levels, a cord and parotids."""
    grid = Grid.axis_aligned((40, 40, 20), (1.0, 1.0, 2.0), (-20.0, -20.0, 0.0))
    names = (BODY, "PTV_7000", "PTV_5600", "SpinalCord", "Parotid_L", "Parotid_R")
    masks = {roi: np.zeros(grid.shape, bool) for roi in names}
    masks[BODY][2:38, 2:38, :] = True
    masks["PTV_7000"][24:30, 15:21, 8:12] = True
    masks["PTV_5600"][24:30, 21:25, 8:12] = True
    masks["SpinalCord"][19:21, 30, :] = True
    masks["Parotid_L"][30:34, 15:20, 8:12] = True
    masks["Parotid_R"][6:10, 15:20, 8:12] = True
    beams = (Beam("1", (0.0,), (0.0, 0.0, 0.0)),)
    return Case("box", grid, None, masks, {"PTV_7000": 70.0, "PTV_5600": 56.0}, beams, "IMRT", "HeadNeck")


def test_shipped_table_is_whole():
    rows = load_constraints()
    assert len(rows) >= 50 and len({(r.structure, str(r.metric), r.site, r.limit) for r in rows}) == len(rows)
    assert sum(r.source.startswith("ADDiff-Dose") for r in rows) >= 50
    assert all(r.source for r in rows)
    kinds = {"Ring(", "Skin(", "_PRV", "-PTV", "PTV_High"}
    assert all(any(kind in r.structure for r in rows) for kind in kinds) and any(r.any_of for r in rows)
    assert any("not certain" in r.note and "QUANTEC" in r.source for r in rows)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"metric": "D95[Gy]"}, "not understood"),
        ({"direction": "<"}, "expected '<=' or '>='"),
        ({"limit": "95%"}, "95%Rx"),
        ({"limit": -1}, "at least 0"),
        ({"limit": "95%Rx", "metric": "V20Gy[%]"}, "dose in Gy"),
        ({"metric": "V20Gy[%]", "limit": 130}, "at most 100 %"),
        ({"weight": 2}, "from 0 to 1"),
        ({"structure": "Ring(PTV, 10, 5)"}, "rising distances"),
        ({"structure": "cord?"}, "not understood"),
        ({"colour": "red"}, "unknown"),
        ({"source": 3}, "texts"),
    ],
)
def test_bad_row_is_named_by_its_line(tmp_path, change, message):
    path = write(tmp_path / "rows.json", ROW, ROW | change)
    with pytest.raises(CaseError, match="line 4") as error:
        load_constraints(path)
    assert message in str(error.value)


def test_bad_files(tmp_path):
    with pytest.raises(CaseError, match="cannot read"):
        load_constraints(tmp_path / "none.json")
    (tmp_path / "a.json").write_text('{"constraints": [\n{"structure": }\n]}')
    with pytest.raises(CaseError, match="line 2"):
        load_constraints(tmp_path / "a.json")
    with pytest.raises(CaseError, match="no rows"):
        load_constraints(write(tmp_path / "b.json"))
    del (row := dict(ROW))["limit"]
    with pytest.raises(CaseError, match=r"missing \['limit'\]"):
        load_constraints(write(tmp_path / "c.json", row))


def test_verdicts(tmp_path, case):
    dose = np.full(case.grid.shape, 44.0)
    (verdict,) = check(load(tmp_path), case, dose)
    assert (verdict.status, verdict.value, verdict.margin, verdict.severity) == ("passed", 44.0, 1.0, 0.0)
    (verdict,) = check(load(tmp_path, limit=40), case, dose)
    assert (verdict.status, verdict.margin) == ("failed", -4.0) and verdict.severity == pytest.approx(0.1)
    (verdict,) = check(load(tmp_path, structure="Heart"), case, dose)
    assert verdict.status == "not_applicable" and math.isnan(verdict.value)
    assert check(load(tmp_path, site="Lung"), case, dose) == []
    high, low = check(load(tmp_path, structure="PTV", metric="D95%[Gy]", direction=">=", limit="70%Rx"), case, dose)
    assert (high.structure, high.status, high.limit) == ("PTV_7000", "failed", pytest.approx(49))
    assert (low.structure, low.status, low.limit) == ("PTV_5600", "passed", pytest.approx(39.2))


def test_at_least_one_side(tmp_path, case):
    rows = [ROW | {"structure": f"Parotid_{s}", "metric": "Mean[Gy]", "limit": 26, "any_of": "parotid"} for s in "LR"]
    constraints = load_constraints(write(tmp_path / "rows.json", *rows))
    dose = 30.0 * case.masks["Parotid_L"]
    left, right = check(constraints, case, dose)
    assert (left.status, right.status) == ("passed", "passed") and left.margin == -4 and "one is enough" in left.note
    left, right = check(constraints, case, dose + 30)
    assert (left.status, right.status) == ("failed", "failed") and compliance([left, right]) == 0


def test_compliance_leaves_out_what_does_not_apply(tmp_path, case):
    rows = [ROW, ROW | {"limit": 10}, ROW | {"structure": "Heart"}]
    constraints = load_constraints(write(tmp_path / "rows.json", *rows))
    assert compliance(check(constraints, case, np.full(case.grid.shape, 20.0))) == 50
    assert math.isnan(compliance([]))


def one(structure, case):
    (region,) = regions(structure, case)
    return whole_mask(region, case)


def test_margins_and_rings_are_in_mm(case):
    cord = case.masks["SpinalCord"]
    grown = one("SpinalCord_PRV03", case)
    assert (
        grown[16:24, 30, 5].all()
        and not grown[15, 30, 5]
        and not grown[24, 30, 5]
        and (grown & cord).sum() == cord.sum()
    )
    ring = one("Ring(PTV_High, 2, 4)", case)
    assert not ring[30:32, 18, 10].any() and ring[32:34, 18, 10].all() and not ring[34, 18, 10]  # 1 mm along i
    assert not ring[27, 18, 12] and ring[27, 18, 13] and not ring[27, 18, 14]  # 2 mm along k
    assert not (ring & case.target_mask()).any()


def test_drawn_structure_comes_before_the_derived_one(case):
    masks = dict(case.masks) | {"SpinalCord_PRV03": case.masks["Parotid_L"]}
    drawn = Case("x", case.grid, None, masks, case.prescription_gy, case.beams, case.technique, case.site)
    assert (one("SpinalCord_PRV03", drawn) == case.masks["Parotid_L"]).all()


def test_skin_is_a_shell_without_the_ends_of_the_scan(case):
    skin = one("Skin(0, 3)", case)
    assert skin[2:5, 20, 10].all() and not skin[5, 20, 10] and skin[20, 35:38, 0].all() and not skin[20, 20, 0]


@pytest.mark.parametrize("edge_mm, layers", [(1.0, 3), (2.0, 2), (4.0, 1), (5.5, 1), (7.0, 0)])
def test_skin_is_measured_from_the_surface_on_coarse_grids_too(case, edge_mm, layers):
    grid = Grid.axis_aligned((40, 40, 8), (edge_mm, edge_mm, 3.0))
    body = np.zeros(grid.shape, dtype=bool)
    body[5:35, 5:35] = True
    coarse = replace(case, grid=grid, masks={BODY: body, "PTV": body}, prescription_gy={"PTV": 70.0})
    found = regions("Skin(0, 3)", coarse)
    depth = int(found[0].mask[:, 15, 4][:15].sum()) if found else 0
    assert depth == layers, "the centre of a layer's voxels lies half an edge below the surface"


def test_levels_crops_and_sides(case):
    assert (one("PTV_High", case) == case.masks["PTV_7000"]).all()
    assert regions("PTV_Mid", case) == [] and regions("PTV_Low", case)[0].prescription_gy == 56
    assert not (one("Body-PTV", case) & case.target_mask()).any()
    assert (one("Parotid_Ipsi", case) == case.masks["Parotid_L"]).all()
    assert (one("Parotid_Contra", case) == case.masks["Parotid_R"]).all()
    fine = case.grid, case.masks["Parotid_R"]
    told = replace(case, source={**case.source, "fine_masks": {"Parotid_R": fine}})
    assert regions("Parotid_Contra", told)[0].fine is regions("Parotid_R", told)[0].fine is fine
    assert regions("Glnd_Submand_Ipsi-PTV", case) == [] and regions("Lungs-GTV", case) == []
    assert (one("Parotids", case) == case.masks["Parotid_L"] | case.masks["Parotid_R"]).all()
