"""Mirroring and conditions taken away."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

from custom.rois import mirror_order
from custom.transforms.augment import RandDropConditionsd, RandMirrord

SPATIAL = ["ct", "sdm_Parotid_L", "sdm_Parotid_R", "sdm_target_high", "sdm_Lung_L"]
CONTEXT = ["has_ct", "has_Parotid_L", "has_Parotid_R", "has_Lung_L"]
PAIRS = [["sdm_Parotid_L", "sdm_Parotid_R"], ["has_Parotid_L", "has_Parotid_R"]]
ROIS = ["Parotid_R", "SpinalCord", "Parotid_L"]
CONFIGS = Path(__file__).resolve().parents[2] / "bundle" / "configs"


@pytest.fixture
def data() -> dict:
    generator = torch.Generator().manual_seed(0)
    return {"image": torch.rand(5, 4, 3, 2, generator=generator), "label": torch.rand(1, 4, 3, 2, generator=generator),
            "rois": torch.rand(3, 4, 3, 2, generator=generator), "context": torch.tensor([1.0, 1.0, 0.0, 1.0])}


def mirror(pairs=PAIRS, prob: float = 1.0) -> RandMirrord:
    return RandMirrord(["image", "label", "rois"], SPATIAL, CONTEXT, ROIS, pairs, prob)


def test_order_swaps_pairs_and_keeps_the_rest():
    assert mirror_order(SPATIAL, PAIRS) == [0, 2, 1, 3, 4]
    assert mirror_order(SPATIAL, [["sdm_Lung_L", "sdm_Lung_R"]]) == [0, 1, 2, 3, 4]  # one is no channel: it stays
    assert mirror_order(ROIS, PAIRS) == [2, 1, 0]  # the structures of these channels


def test_mirror_flips_left_to_right_and_swaps_sides(data):
    out = mirror()(data)
    assert torch.equal(out["image"][0], data["image"][0].flip(0))
    assert torch.equal(out["image"][1], data["image"][2].flip(0))  # what was the right parotid is the left one now
    assert torch.equal(out["rois"][0], data["rois"][2].flip(0)) and torch.equal(out["rois"][1], data["rois"][1].flip(0))
    assert torch.equal(out["label"], data["label"].flip(1))
    assert out["context"].tolist() == [1, 0, 1, 1]


def test_mirrored_organs_keep_their_names_where_asked(data):
    out = mirror([])(data)
    assert all(torch.equal(out[key], data[key].flip(1)) for key in ("image", "label", "rois"))
    assert torch.equal(out["context"], data["context"])


@pytest.mark.parametrize("pairs, swapped", [([], "sdm_Parotid_L"),
                                            ([["sdm_Parotid_R", "sdm_Parotid_L"]], "sdm_Parotid_R")])
def test_training_swaps_pairs_where_inference_does(pairs, swapped):
    parser = ConfigParser()
    parser.read_config([CONFIGS / "inference.json", CONFIGS / "train.json"])
    parser["swap_channels"] = pairs
    (at,) = (i for i, node in enumerate(parser["train"]["random_transforms"])
             if isinstance(node, dict) and node["_target_"].endswith("RandMirrord"))
    names, rois = (parser.get_parsed_content(key) for key in ("spatial_channels", "roi_names"))
    orders = parser.get_parsed_content(f"train#random_transforms#{at}").orders
    assert [names[i] for i in orders["image"]].index("sdm_Parotid_L") == names.index(swapped)
    assert [rois[i] for i in orders["rois"]].index("Parotid_L") == rois.index(swapped.removeprefix("sdm_"))


def test_the_beams_of_a_mirrored_patient_come_from_the_other_side():
    parser = ConfigParser()
    parser.read_config(CONFIGS / "inference.json")
    names = parser.get_parsed_content("spatial_channels")
    mirrored = [names[i] for i in mirror_order(names, parser.get_parsed_content("swap_channels"))]
    angles = {name: int(name.removeprefix("plan_beam_")) for name in names if name.startswith("plan_beam_")}
    assert len(angles) == 9
    assert all((angles[a] + angles[b]) % 360 == 0 if a in angles else a == b for a, b in zip(names, mirrored))


def test_mirroring_twice_is_the_identity(data):
    kept = {key: value.clone() for key, value in data.items()}
    out = mirror()(mirror()(data))
    assert all(torch.equal(out[key], kept[key]) and torch.equal(data[key], kept[key]) for key in kept)


def test_mirror_happens_as_often_as_asked(data):
    transform = mirror(prob=0.3)
    transform.set_random_state(0)
    share = sum(not torch.equal(transform(data)["label"], data["label"]) for _ in range(400)) / 400
    assert share == pytest.approx(0.3, abs=0.07)
    assert all(torch.equal(mirror(prob=0.0)(data)[key], data[key]) for key in data)


def test_dropped_conditions_look_like_absent_ones(data):
    out = RandDropConditionsd("image", SPATIAL, CONTEXT, ct_prob=1.0, organ_prob=1.0)(data)
    assert out["context"].tolist() == [0, 0, 0, 0]
    assert (out["image"][0] == 0).all() and (out["image"][[1, 2, 4]] == -1).all()
    assert torch.equal(out["image"][3], data["image"][3])  # a target is never taken away
    assert data["context"].tolist() == [1, 1, 0, 1] and (data["image"] >= 0).all()  # the sample itself is untouched


def test_nothing_dropped_changes_nothing(data):
    out = RandDropConditionsd("image", SPATIAL, CONTEXT, ct_prob=0.0, organ_prob=0.0)(data)
    assert all(torch.equal(out[key], data[key]) for key in data)


def test_drops_come_as_often_as_asked(data):
    transform = RandDropConditionsd("image", SPATIAL, CONTEXT, ct_prob=0.2, organ_prob=0.1)
    transform.set_random_state(0)
    seen = torch.stack([transform(data)["context"] for _ in range(500)])
    assert 1 - seen[:, 0].mean().item() == pytest.approx(0.2, abs=0.06)
    assert 1 - seen[:, 1].mean().item() == pytest.approx(0.1, abs=0.05)


def test_dropped_organs_are_absent_in_every_form_of_distance():
    names, flags = ["psdm_Larynx", "tsbdm_Larynx", "mask_Larynx", "psdm_target_high"], [
        "has_Larynx", "overlap_Larynx", "plan_mean_Larynx", "prescription_level"]
    data = {"image": torch.ones(4, 3, 3, 2), "context": torch.ones(4)}
    out = RandDropConditionsd("image", names, flags, ct_prob=0.0, organ_prob=1.0)(data)
    assert out["image"].amax((1, 2, 3)).tolist() == [-5.0, 0.0, 0.0, 1.0]
    assert out["context"].tolist() == [0.0, 0.0, 0.0, 1.0]
