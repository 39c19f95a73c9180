"""The plain U-Net: any size, a dose inside the body, gradients everywhere, and one case learnt."""

from __future__ import annotations

import pytest
import torch

from custom.case import CaseError
from custom.networks.unet_regression import UNetRegression

CHANNELS = ["ct", "body", "prescription"]


def make_network() -> UNetRegression:
    torch.manual_seed(0)
    return UNetRegression(CHANNELS, channels=[4, 8, 8], num_res_units=1)


def make_image(size=(9, 12, 7)) -> torch.Tensor:
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    image[:, 1] = 0
    image[:, 1, 1:-1, 1:-1] = 1
    return image


@pytest.mark.parametrize("size", [(9, 12, 7), (8, 8, 8), (3, 4, 5)])
def test_any_size_gives_a_dose_inside_the_body(size):
    image = make_image(size)
    with torch.no_grad():
        dose = make_network().eval()(image)
    assert dose.shape == (1, 1, *size) and float(dose.min()) >= 0
    assert not dose[image[:, 1:2] == 0].any()


def test_gradients_reach_every_parameter():
    network = make_network().train()
    (network(make_image()) ** 2).sum().backward()
    # a bias before an instance norm says nothing: MONAI's block has one, and its gradient is rounding error
    silent = [n for n, p in network.named_parameters() if p.grad is None]
    weights = [n for n, p in network.named_parameters() if n.endswith("weight") and not p.grad.abs().sum() > 0]
    assert silent == [] and weights == []


def test_one_case_is_overfitted():
    network, image = make_network().train(), make_image((8, 8, 8))
    label = (0.3 + 0.7 * (image[:, 2:3] > 0.5)) * image[:, 1:2]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    errors = []
    for _ in range(60):
        loss = (network(image) - label).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.35 * errors[0]


def test_body_is_wanted():
    with pytest.raises(CaseError, match="body"):
        UNetRegression(["ct"])
