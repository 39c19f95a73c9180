"""Condition channels of a drawn case: every builder, what is absent, and the tensors of training."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from custom.case import Beam, Case, CaseError, Grid
from custom.metrics import DoseScore
from custom.physics.fluence import load_objectives, objectives_path
from custom.transforms.condition import (
    BUILDERS,
    AppendContextd,
    ConditionChannelsd,
    Conditions,
    PackLabeld,
    TrainingTensorsd,
)

SHAPE = (30, 26, 12)


def blob(centre, half) -> np.ndarray:
    index = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    return (np.abs(index - np.array(centre)) <= half).all(-1)


def drawn_case(levels=(70.0, 63.0, 56.0), **changes) -> Case:
    """A box of water with nested targets, the left parotid and two lungs; 4 x 5 x 6 mm."""
    grid = Grid.axis_aligned(SHAPE, (4, 5, 6), (-58, -62.5, -33))
    body = blob((15, 13, 6), (12, 10, 5))
    masks = {"Body": body, "Parotid_L": blob((22, 13, 6), (2, 2, 2)), "Larynx": np.zeros(SHAPE, bool),
             "Lung_L": blob((20, 18, 3), (2, 2, 2)), "Lung_R": blob((8, 18, 3), (2, 2, 2))}
    prescription = {f"PTV_{gy:.0f}00": gy for gy in levels}
    masks |= {roi: blob((14, 13, 6), 1 + n) for n, roi in enumerate(prescription)}
    dose = np.where(body, 30.0, 0.0).astype(np.float32)
    beams = tuple(Beam(f"G{a}", (float(a),), (-2.0, 2.5, 3.0)) for a in (0, 120, 240))
    given = dict(name="drawn", grid=grid, ct_hu=np.where(body, 40.0, -1000.0).astype(np.float32), masks=masks,
                 prescription_gy=prescription, beams=beams, technique="IMRT", site="HeadNeck", dose_gy=dose,
                 dose_grid=grid)
    return Case(**{**given, **changes})


@pytest.fixture(scope="module")
def conditions() -> Conditions:
    return Conditions(drawn_case(), {"objectives": None, "iterations": 5}, 12.0, {"sparing": {"Target": 0.1}})


# ------------------------------------------------------------------------------------------------------ builders
SPATIAL = ["ct", "body", "prescription", "plan_prior", "plan_prior_sparing", "plan_beam_120",
           "beam_high", "beam_mid", "beam_low", "mask_Parotid_L",
           "sdm_target_high", "sdm_target_mid", "sdm_target_low", "sdm_Parotid_L",
           *(f"{form}_{roi}" for form in ("psdm", "isdm", "tsbdm", "mask") for roi in ("target_high", "Parotid_L"))]
CONTEXT = ["has_ct", "has_target_mid", "has_Parotid_L", "is_vmat", "is_lung", "prescription_level", "spacing_x",
           "volume_target_high", "volume_body", "length_target", "length_body", "overlap_Lung_L",
           "plan_mean_Larynx"]


def test_every_builder_is_tried_here():
    tried = {next(p for p in BUILDERS if name == p or (p.endswith("_") and name.startswith(p)))
             for name in SPATIAL + CONTEXT}
    assert tried == set(BUILDERS)


@pytest.mark.parametrize("name", SPATIAL)
def test_spatial_builders_give_finite_volumes(conditions, name):
    volume = conditions.build(name)
    assert volume.shape == SHAPE and volume.dtype == np.float32 and np.isfinite(volume).all() and np.ptp(volume) > 0


@pytest.mark.parametrize(("name", "value"), [
    *zip(CONTEXT, (1, 1, 1, 0, 0, 1, 1, 0.00324, 0.0693, 0.42, 0.66, 0, 0), strict=True)])
def test_context_builders_give_numbers(conditions, name, value):
    assert conditions.build(name) == pytest.approx(value) and isinstance(conditions.build(name), float)


def test_values_in_network_units(conditions):
    case = conditions.case
    assert np.unique(conditions.build("ct")) == pytest.approx([-1.0, 0.04])
    assert np.array_equal(conditions.build("body") == 1, case.body)
    assert np.array_equal(conditions.build("mask_Parotid_L") == 1, case.masks["Parotid_L"])
    distance = conditions.build("sdm_Parotid_L")
    assert distance[22, 13, 6] == pytest.approx((3 * 4 - 2) / 50)  # the centre: three voxels to the outside
    assert distance[28, 13, 6] == pytest.approx(-(4 * 4 - 2) / 50) and distance[0, 0, 0] == -1  # beyond 5 cm
    assert [conditions.build(f"spacing_{axis}") for axis in "xyz"] == [1.0, 1.25, 1.5]
    assert conditions.build("plan_prior")[case.masks["PTV_7000"]].mean() == pytest.approx(1.0, abs=0.15)
    assert conditions.build("beam_high")[case.masks["PTV_7000"]].mean() == pytest.approx(1.0, abs=1e-3)


def test_plans_of_other_trade_offs(conditions):
    """With heavier targets their coldest voxels get more dose, with lighter ones the tissue around them gets less."""
    case, factors = conditions.case, {"coverage": {"Target": 20.0}, "sparing": {"Target": 0.05}}
    traded = Conditions(case, {"objectives": None, "iterations": 30}, 12.0, factors)
    usual, covering, sparing = (traded.build(name) for name in
                                ("plan_prior", "plan_prior_coverage", "plan_prior_sparing"))
    target = case.target_mask()
    assert np.percentile(sparing[target], 2) < np.percentile(usual[target], 2) < np.percentile(covering[target], 2)
    tissue = case.body & ~target
    assert sparing[tissue].mean() < usual[tissue].mean() < covering[tissue].mean()
    with pytest.raises(CaseError, match="'plan_prior_bold'.*no such trade-off; they have coverage, sparing"):
        traded.build("plan_prior_bold")


def test_the_plans_dose_beam_by_beam(conditions):
    """Beams from 0, 120 and 240 degrees: each sector holds its own, from its side; all together are the plan."""
    doses = {angle: conditions.build(f"plan_beam_{angle}") for angle in range(0, 360, 40)}
    np.testing.assert_allclose(sum(doses.values()), conditions.build("plan_prior"), atol=1e-5)
    assert [angle for angle, dose in doses.items() if dose.any()] == [0, 120, 240]
    j = np.arange(SHAPE[1])[None, :, None]
    depth = {angle: (doses[angle] * j).sum() / doses[angle].sum() for angle in (0, 120, 240)}
    assert depth[0] < depth[120] and depth[0] < depth[240]  # gantry 0 is anterior: most of its dose lies there
    for angle in ("20", "360", "x"):
        with pytest.raises(CaseError, match=f"'plan_beam_{angle}'.*sectors of 40 degrees.*plan_beam_40"):
            conditions.build(f"plan_beam_{angle}")


def test_directions_of_an_arc_go_to_the_nearest_sector():
    angles = (345.0, 10.0, 21.0, 60.0, 79.0)
    beams = (Beam("arc", angles, (-2.0, 2.5, 3.0)),)
    drawn = Conditions(drawn_case(beams=beams), {"objectives": None, "iterations": 2}, 12.0)
    model = drawn.beam_model
    fields = {direction.gantry_deg: model.volume(field.forward(fluence))
              for direction, field, fluence in zip(model.directions, model.fields, drawn.plan().fluences)}
    assert set(fields) == set(angles)
    for sector, members in ((0, (345.0, 10.0)), (40, (21.0,)), (80, (60.0, 79.0)), (120, ())):
        expected = sum((fields[angle] / 70.0 for angle in members), np.zeros(SHAPE))
        np.testing.assert_allclose(drawn.build(f"plan_beam_{sector}"), expected, atol=1e-5)


def test_figures_of_the_whole_patient(conditions):
    """Two thirds of the parotid lie in the lowest target; the highest is 27 voxels of 120 mm^3."""
    masks = conditions.case.masks | {"Parotid_L": blob((17, 13, 6), (1, 1, 1))}
    drawn = Conditions(drawn_case(masks=masks), {"objectives": None, "iterations": 2}, 12.0)
    assert drawn.build("overlap_Parotid_L") == pytest.approx(2 / 3)
    assert drawn.build("volume_target_high") == pytest.approx(27 * 120e-6)
    assert drawn.build("plan_mean_Parotid_L") == pytest.approx(drawn.build("plan_prior")[masks["Parotid_L"]].mean())
    for name in ("overlap_Larynx", "plan_mean_Larynx", "volume_target_other"):
        assert drawn.build(name) == 0.0


def test_the_bundles_trade_offs_reach_their_channels():
    build = ConditionChannelsd(spatial_channels=["plan_prior_sparing"])
    assert set(build.trade_offs) == {"coverage", "sparing"}


def test_higher_targets_are_painted_over_lower_ones(conditions):
    painted, masks = conditions.build("prescription"), conditions.case.masks
    assert np.unique(painted) == pytest.approx([0, 0.8, 0.9, 1.0])
    assert (painted[masks["PTV_7000"]] == 1.0).all()
    assert painted[masks["PTV_6300"] & ~masks["PTV_7000"]] == pytest.approx(0.9)
    assert painted[masks["PTV_5600"] & ~masks["PTV_6300"]] == pytest.approx(0.8)


@pytest.mark.parametrize(("doses", "names"), [
    ((70.0,), {"high": ["PTV_7000"]}),
    ((70.0, 56.0), {"high": ["PTV_7000"], "low": ["PTV_5600"]}),
    ((70.0, 63.0, 56.0), {"high": ["PTV_7000"], "mid": ["PTV_6300"], "low": ["PTV_5600"]}),
    ((70.0, 66.0, 60.0, 54.0), {"high": ["PTV_7000"], "mid": ["PTV_6600", "PTV_6000"], "low": ["PTV_5400"]}),
])
def test_levels(doses, names):
    case = drawn_case(doses)
    levels = Conditions(case).levels
    assert set(levels) == set(names)
    for level, rois in names.items():
        assert np.array_equal(levels[level], np.logical_or.reduce([case.masks[roi] for roi in rois]))
    absent = {"high", "mid", "low"} - set(names)
    for level in absent:
        assert (Conditions(case).build(f"sdm_target_{level}") == -1).all()
        assert Conditions(case).build(f"has_target_{level}") == 0.0
    if absent:
        assert (Conditions(case, beamlet_mm=15.0).build(f"beam_{min(absent)}") == 0).all()


def test_beams_to_a_level_pass_all_higher_targets(conditions):
    """The low level's apertures show everything, so more is open than for the high one."""
    rim = conditions.case.masks["PTV_5600"] & ~conditions.case.masks["PTV_6300"]
    assert conditions.build("beam_low")[rim].mean() > conditions.build("beam_high")[rim].mean()


@pytest.mark.parametrize("roi", ["Larynx", "Brainstem"], ids=["empty", "missing"])
def test_absent_organ_is_told_by_its_flag(conditions, roi):
    assert (conditions.build(f"sdm_{roi}") == -1).all() and not conditions.build(f"mask_{roi}").any()
    assert conditions.build(f"has_{roi}") == 0.0


def test_absent_ct_is_told_by_its_flag():
    without = Conditions(drawn_case(ct_hu=None, technique="VMAT", site="Lung"))
    assert not without.build("ct").any() and without.build("has_ct") == 0.0
    assert without.build("is_vmat") == 1.0 and without.build("is_lung") == 1.0


def test_pair_is_joined_from_its_halves(conditions):
    both = conditions.case.masks["Lung_L"] | conditions.case.masks["Lung_R"]
    assert np.array_equal(conditions.build("mask_Lungs") == 1, both) and conditions.build("has_Lungs") == 1.0


@pytest.mark.parametrize("name", ["cct", "sdmParotid_L", "Body"])
def test_unknown_channel_is_named(conditions, name):
    with pytest.raises(CaseError, match=f"'{name}' is unknown; known are beam_, body, ct"):
        conditions.build(name)


# ------------------------------------------------------------------------------------------------------ transforms
@pytest.fixture(scope="module")
def data():
    build = ConditionChannelsd(spatial_channels=["ct", "body", "sdm_Parotid_L"],
                               context_channels=["has_ct", "has_Larynx", "prescription_level"])
    return build({"work": drawn_case()})


def test_channels_keep_their_order_and_their_place(data):
    case = data["work"]
    assert data["image"].shape == (3, *SHAPE) and data["image"].dtype == torch.float32
    assert isinstance(data["image"], MetaTensor)
    np.testing.assert_allclose(np.asarray(data["image"].affine), case.grid.ras_affine)
    assert np.array_equal(data["image"][1].numpy() == 1, case.body)
    assert data["context"].tolist() == pytest.approx([1.0, 0.0, 1.0])
    assert data["label"].shape == data["body"].shape == (1, *SHAPE)
    assert data["label"].max().item() == pytest.approx(30 / 70)


def test_case_without_reference_dose_has_no_label():
    build = ConditionChannelsd(spatial_channels=["body"], context_channels=["has_ct"])
    data = build({"work": dataclasses.replace(drawn_case(), dose_gy=None)})
    assert "label" not in data
    with pytest.raises(CaseError, match="drawn: training needs a reference dose"):
        TrainingTensorsd()(data)


def test_context_becomes_constant_channels(data):
    out = AppendContextd()({**data, "image": data["image"].half()})["image"]
    assert out.shape == (6, *SHAPE) and out.dtype == torch.float32
    assert [out[n].unique().tolist() for n in (3, 4, 5)] == [[1.0], [0.0], [1.0]]


def test_training_tensors_keep_the_order_of_the_rois(data):
    names = ["Larynx", "Parotid_L", "target_low", "target_high", "Lungs", "target_mid"]
    out, case = TrainingTensorsd(roi_names=names)(data), data["work"]
    wanted = [case.masks["Larynx"], case.masks["Parotid_L"], case.masks["PTV_5600"], case.masks["PTV_7000"],
              case.masks["Lung_L"] | case.masks["Lung_R"], case.masks["PTV_6300"]]
    assert out["rois"].dtype == torch.uint8 and np.array_equal(out["rois"].numpy(), np.stack(wanted))
    assert set(out) == {"image", "context", "label", "body", "rois", "prescription_gy", "voxel_cc"}
    assert out["image"].dtype == out["label"].dtype == torch.float16 and out["body"].dtype == torch.uint8
    assert out["prescription_gy"].item() == 70 and out["voxel_cc"].item() == pytest.approx(0.12)


def test_packed_label_gives_the_score_in_gy(data):
    label = PackLabeld()(TrainingTensorsd()(data))["label"]
    assert label.shape == (2, *SHAPE) and label[1].unique().tolist() == [0.0, 70.0]
    metric = DoseScore()
    metric(y_pred=[label[:1] + 0.1], y=[label])
    assert metric.aggregate().item() == pytest.approx(7.0, rel=1e-3)


def test_the_users_own_protocol_reaches_the_plan_prior(tmp_path):
    """A cord limit halved in a file of one's own halves the planning objective that follows it; no file, no change."""
    own = json.loads((objectives_path().parent / "constraints.json").read_text())
    rows = [row for row in own["constraints"] if row["structure"] == "SpinalCord" and row["metric"] == "Max[Gy]"]
    for row in rows:
        row["limit"] = row["limit"] / 2
    (tmp_path / "mine.json").write_text(json.dumps(own))
    usual = ConditionChannelsd(spatial_channels=["plan_prior"]).plan_options["objectives"]
    mine = ConditionChannelsd(spatial_channels=["plan_prior"], constraints=str(tmp_path / "mine.json"))
    both = zip(usual, mine.plan_options["objectives"], strict=True)
    pairs = [(a.dose_gy, b.dose_gy) for a, b in both if a.structure == "SpinalCord"]
    assert rows and pairs and all(b == pytest.approx(a / 2) for a, b in pairs)
    assert usual == load_objectives()
