"""The plan prior follows the protocol: as it was tuned by default, moved where a limit is edited."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from custom.case import Beam, Case, CaseError, Grid
from custom.dosimetry.constraints import load_constraints
from custom.physics.fluence import BeamModel, Objective, load_objectives, plan_dose
from custom.physics.limits import edited, follow, own_objectives, protocol_path, read_protocol
from custom.transforms.condition import ConditionChannelsd
from custom.transforms.edited import EditedLimitsd

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "bundle" / "configs"
ROWS = json.loads((CONFIGS / "plan_objectives.json").read_text())["objectives"]
TUNED = [{key: value for key, value in row.items() if key != "follows"} for row in ROWS]


def protocol_with(tmp_path, **limits):
    """The bundle's protocol with other limits: ``"SpinalCord Max[Gy]" -> 30``."""
    record = json.loads((CONFIGS / "constraints.json").read_text())
    for name, limit in limits.items():
        found = [r for r in record["constraints"] if f"{r['structure']} {r['metric']}" == name]
        assert found, name
        for row in found:
            row["limit"] = limit
    path = tmp_path / "protocol.json"
    path.write_text(json.dumps(record))
    return path


def test_with_the_bundles_protocol_every_objective_is_as_it_was_tuned():
    """Down to the type of the number: training's cache is found by the pickled objectives."""
    found = load_objectives()
    assert found == tuple(Objective(**row) for row in TUNED)
    assert [type(row.dose_gy) for row in found] == [type(row.get("dose_gy")) for row in TUNED]
    plain = tuple(Objective(**json.loads(json.dumps(row))) for row in TUNED)
    assert pickle.dumps(found) == pickle.dumps(plain)


def test_every_limit_that_is_followed_is_in_the_bundles_protocol():
    """Else an edit would move nothing: the text must name a row, with its very limit."""
    limits = {f"{r.structure} {r.metric} {r.limit_text.replace(' of Rx', 'Rx').replace(' Gy', '')}"
              for r in load_constraints()}
    followed = [row["follows"] for row in ROWS if "follows" in row]
    assert len(followed) >= 14 and [text for text in followed if text not in limits] == []


def test_an_edited_limit_scales_the_objectives_that_follow_it(tmp_path):
    edits = {"SpinalCord Max[Gy]": 30, "Parotid_L Mean[Gy]": 13, "PTV_High D95%[Gy]": "98%Rx"}
    found = load_objectives(constraints=protocol_with(tmp_path, **edits))
    moved = [(new, old) for new, old in zip(found, load_objectives()) if new != old]
    assert [new.structure for new, _ in moved] == ["Target", "SpinalCord", "Parotid_L"]
    assert moved[0][0].dose_share == pytest.approx(1.02 * 0.98) and moved[0][0].kind == "min"
    assert moved[1][0].dose_gy == pytest.approx(38.4 * 30 / 45) and moved[2][0].dose_gy == pytest.approx(10)


def test_own_objectives_file_follows_the_protocol_beside_it(tmp_path):
    protocol_with(tmp_path, **{"SpinalCord Max[Gy]": 22.5}).rename(tmp_path / "constraints.json")
    (tmp_path / "mine.json").write_text(json.dumps({"objectives": ROWS}))
    cord = next(row for row in load_objectives(tmp_path / "mine.json") if row.structure == "SpinalCord")
    assert cord.dose_gy == pytest.approx(19.2)


def test_a_limit_that_is_gone_or_in_another_unit_leaves_the_objective(caplog):
    tuned = {"structure": "SpinalCord", "kind": "max", "dose_gy": 38.4, "weight": 1}
    row = tuned | {"follows": "SpinalCord Max[Gy] <= 45"}
    limit = {"structure": "SpinalCord", "metric": "Max[Gy]", "direction": "<="}
    assert follow(row, []) == tuned and follow(row, [limit | {"metric": "Mean[Gy]", "limit": 10}]) == tuned
    assert follow(row, [limit | {"limit": "60%Rx"}]) == tuned and "another unit" in caplog.text
    assert follow(row, [limit | {"limit": 45.0}])["dose_gy"] == 38.4
    for text in ("SpinalCord < 45", "SpinalCord Max[Gy] <= 0", 7):
        with pytest.raises(CaseError, match="follows"):
            follow(row | {"follows": text}, [])


def test_a_row_with_a_plan_weight_is_an_objective_of_its_own():
    row = {"structure": "OpticChiasm", "metric": "Max[Gy]", "direction": "<=", "limit": 50, "plan_weight": 20}
    assert own_objectives([row]) == [
        {"structure": "OpticChiasm", "kind": "max", "weight": 20, "level": None, "dose_gy": 50.0}]
    (volume,) = own_objectives([row | {"metric": "V20Gy[%]", "limit": 30}])
    (target,) = own_objectives([row | {"structure": "PTV_Low", "direction": ">=", "limit": "95%Rx"}])
    (share,) = own_objectives([row | {"metric": "D2%[%]", "limit": 107}])
    assert (volume["dose_gy"], target["dose_share"], target["level"], share["dose_share"]) == (20, 0.95, "low", 1.07)
    assert target["structure"] == "Target" and target["kind"] == "min"
    assert own_objectives([row | {"plan_weight": 0}]) == []
    with pytest.raises(CaseError, match="drawn structure"):
        own_objectives([row | {"structure": "SpinalCord_Ipsi"}])
    with pytest.raises(CaseError, match="drawn structure"):
        own_objectives([row | {"structure": "Ring(PTV, 5, 10)"}])
    for derived in ("Lungs", "Parotids", "SpinalCord_PRV05"):
        with pytest.raises(CaseError, match=f"{derived}: plan_weight wants a drawn structure"):
            own_objectives([row | {"structure": derived}])


def test_plan_weight_is_checked_and_reaches_the_planner(tmp_path):
    row = {"structure": "Cochlea_L", "metric": "Mean[Gy]", "direction": "<=", "limit": 45, "weight": 0.4,
           "site": "HeadNeck", "source": "test", "plan_weight": 12}
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"constraints": [row]}))
    assert load_constraints(path)[0].plan_weight == 12
    assert load_objectives(constraints=path)[-1] == Objective("Cochlea_L", "max", 12, dose_gy=45.0)
    path.write_text(json.dumps({"constraints": [row | {"plan_weight": -1}]}))
    with pytest.raises(CaseError, match="plan_weight -1"):
        load_constraints(path)


def test_protocols_that_cannot_be_read_are_named(tmp_path):
    for text in ("{}", '{"constraints": [{"metric": "Max[Gy]"}]}', "no"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(CaseError, match="bad.json"):
            read_protocol(tmp_path / "bad.json")
    with pytest.raises(CaseError, match="none.json"):
        load_objectives(constraints=tmp_path / "none.json")


# ---------------------------------------------------------------------------------------------------------- the dose
SHAPE = (36, 36, 12)


def water():
    grid = Grid.axis_aligned(SHAPE, (5, 5, 5), (-87.5, -87.5, -27.5))
    x, y, z = np.stack(np.meshgrid(*grid.axes_mm(), indexing="ij"))
    masks = {"Body": np.hypot(x, y) < 80, "PTV_7000": (np.hypot(x, y) < 18) & (np.abs(z) < 16)}
    masks |= {"SpinalCord": (np.hypot(x, y - 36) < 10), "Parotid_L": np.hypot(x - 40, y) < 12}
    beams = tuple(Beam(f"G{a:.0f}", (float(a),), (0, 0, 0)) for a in np.arange(5) * 72)
    ct = np.where(masks["Body"], 0, -1000).astype(np.float32)
    return Case("water", grid, ct, masks, {"PTV_7000": 70.0}, beams, "IMRT", "HeadNeck")


def test_an_edited_limit_moves_the_planned_dose(tmp_path):
    case = water()
    beams = BeamModel(case, beamlet_mm=8.0)

    def hottest(path, roi):
        dose = plan_dose(case, load_objectives(constraints=path), beams=beams, iterations=25).dose_gy
        return np.percentile(dose[case.masks[roi]], 98), dose[case.masks["PTV_7000"]].mean()

    default = hottest(None, "SpinalCord")
    strict = hottest(protocol_with(tmp_path, **{"SpinalCord Max[Gy]": 20}), "SpinalCord")
    assert strict[0] < default[0] - 5 and abs(strict[1] - default[1]) < 2
    parotid = hottest(None, "Parotid_L")[0]
    assert hottest(protocol_with(tmp_path, **{"Parotid_L Mean[Gy]": 5}), "Parotid_L")[0] < parotid - 0.3


def test_the_plan_does_not_depend_on_the_hash_seed():
    """Sets of names have another order in every process; the voxel sample must not."""
    program = (
        "import hashlib, numpy as np\n"
        "from custom.case import Beam, Case, Grid\n"
        "from custom.physics.fluence import plan_dose\n"
        "grid = Grid.axis_aligned((30, 30, 30), (5, 5, 5), (-72.5, -72.5, -72.5))\n"
        "x, y, z = np.stack(np.meshgrid(*grid.axes_mm(), indexing='ij'))\n"
        "body = np.hypot(x, y) < 70\n"
        "masks = {'Body': body, 'PTV_7000': (np.hypot(x, y) < 18) & (abs(z) < 16), 'Lung_L': body & (x > 20),\n"
        "         'Lung_R': body & (x < -20), 'Heart': body & (y > 20) & (abs(x) < 20)}\n"
        "beams = tuple(Beam(str(a), (float(a),), (0, 0, 0)) for a in (0, 120, 240))\n"
        "case = Case('c', grid, None, masks, {'PTV_7000': 70.0}, beams, 'IMRT', 'Lung')\n"
        "dose = plan_dose(case, iterations=3, beamlet_mm=12.0).dose_gy\n"
        "import sys; sys.stdout.write(hashlib.sha256(dose.tobytes()).hexdigest())\n"
    )
    digests = {
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True,
                       env=os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT)}).stdout
        for seed in (1, 2)
    }
    assert len(digests) == 1


def test_limits_are_edited_in_memory():
    protocol = [{"structure": "SpinalCord", "metric": "Max[Gy]", "direction": "<=", "limit": 45},
                {"structure": "Heart", "metric": "Mean[Gy]", "direction": "<=", "limit": 26}]
    assert [row["limit"] for row in edited(protocol, {"SpinalCord Max[Gy]": 30})] == [30, 26]
    assert protocol[0]["limit"] == 45
    with pytest.raises(CaseError, match="Cord Max"):
        edited(protocol, {"Cord Max[Gy]": 30})
    found = load_objectives(constraints=edited(read_protocol(protocol_path()), {"SpinalCord Max[Gy]": 22.5}))
    assert next(row for row in found if row.structure == "SpinalCord").dose_gy == pytest.approx(19.2)


def test_conditions_under_edited_limits_differ_in_the_plan_prior_only():
    options = {"spatial_channels": ("body", "plan_prior"), "plan_beamlet_mm": 15.0, "plan_iterations": 10}
    data = {"work": water()}
    default, same, moved = (build(data)["image"].numpy() for build in (
        ConditionChannelsd(**options), EditedLimitsd({"SpinalCord Max[Gy]": 45}, **options),
        EditedLimitsd({"SpinalCord Max[Gy]": 15}, **options)))
    assert np.array_equal(default, same) and np.array_equal(default[0], moved[0])
    cord = water().masks["SpinalCord"]
    assert moved[1][cord].max() < default[1][cord].max() - 0.05
