"""What the calibration learns from, and which slices of a slab are judged."""

from __future__ import annotations

import pytest
import torch

from custom.case import CaseError
from custom.networks.magdiff_adc import MAGDiffADC
from custom.objectives_axial import CalibrationObjective, InnerSlicesObjective

CHANNELS = ["ct", "mask_Parotid_L", "body", "prescription_level"]


def make_network() -> MAGDiffADC:
    torch.manual_seed(0)
    network = {"channels": [8, 8], "blocks": 1, "embedding_dim": 8, "hidden_channels": 4, "guide_channels": 4}
    return MAGDiffADC(CHANNELS, network=network, calibration={"channels": 8, "layers": 2})


def make_batch() -> dict[str, torch.Tensor]:
    image = torch.rand(1, 4, 10, 12, 5, generator=torch.Generator().manual_seed(1))
    image[:, 2:] = 1.0
    image[:, 1] = 0.0
    image[:, 1, :5] = 1.0
    return {"image": image, "label": torch.full((1, 1, 10, 12, 5), 0.6), "body": image[:, 2:3], "rois": image[:, 1:2]}


def test_only_slices_with_both_neighbours_count():
    seen = {}

    def objective(network, batch):
        seen.update(batch)
        return {"loss": batch["body"].sum()}

    batch = make_batch()
    assert InnerSlicesObjective(objective, 1)(None, batch)["loss"] == 10 * 12 * 3
    for key in ("body", "rois"):
        assert not seen[key][..., [0, -1]].any() and torch.equal(seen[key][..., 1:-1], batch[key][..., 1:-1])
    assert torch.equal(seen["label"], batch["label"]) and batch["body"].all()
    assert InnerSlicesObjective(objective, 0)(None, batch)["loss"] == 10 * 12 * 5
    with pytest.raises(CaseError, match="crops of 5 slices"):
        InnerSlicesObjective(objective, 3)(None, batch)
    with pytest.raises(CaseError, match="halo -1"):
        InnerSlicesObjective(objective, -1)


def test_calibration_is_the_weighted_error_of_the_untouched_dose_at_first():
    """The calibration starts as nothing and an untrained v-network predicts v = 0, so the first loss is known."""
    network, batch = make_network(), make_batch()
    loss = CalibrationObjective(num_steps=1, roi_weight=3.0, generator=torch.Generator().manual_seed(5))(network, batch)
    noise = torch.randn(1, 1, 10, 12, 5, generator=torch.Generator().manual_seed(5))
    a, _ = network.schedule.scales(torch.tensor([999]))
    dose = ((a * noise).clamp(-1, 1) + 1) / 2 * 8 / 7
    weight = 1 + 3 * batch["rois"]
    expected = ((dose - 0.6).abs() * weight).sum() / weight.sum()
    torch.testing.assert_close(loss["calibration"], expected)


def test_calibration_trains_the_calibration_only_and_structures_only():
    network, batch = make_network(), make_batch()
    batch["label"] = torch.full_like(batch["label"], 1.0)
    objective = CalibrationObjective(num_steps=1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = objective(network, batch)["calibration"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    after = network.state_dict()
    changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"calibration"}
    conditions = network.encode(batch["image"])
    dose = torch.full((1, 1, 10, 12, 5), 0.3)
    refined = network.refine(dose, conditions)
    inside = batch["rois"] > 0
    assert torch.equal(refined[~inside], dose[~inside]) and not torch.equal(refined[inside], dose[inside])
