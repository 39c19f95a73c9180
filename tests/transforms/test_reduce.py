"""What an ablation leaves out is gone, the rest is untouched."""

import pytest
import torch

from custom.case import CaseError
from custom.transforms.reduce import ReduceConditionsd

NAMES = ["ct", "sdm_Heart", "beam_high", "beam_low", "plan_prior"]


@pytest.fixture
def data():
    return {"image": torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(0))}


def test_channels_go_one_by_one_and_by_prefix(data):
    out = ReduceConditionsd(spatial_channels=NAMES, left_out=["beam_", "sdm_Heart"])(data)["image"]
    assert (out[2:4] == 0).all() and (out[1] == -1).all()
    assert torch.equal(out[[0, 4, 5]], data["image"][[0, 4, 5]])
    assert not (data["image"][2:4] == 0).any()  # the cached item itself is not changed


def test_distances_become_masks(data):
    out = ReduceConditionsd(spatial_channels=NAMES, distances_as_masks=True)(data)["image"]
    assert torch.equal(out[1], (data["image"][1] > 0).float())
    assert torch.equal(out[[0, 2, 3, 4, 5]], data["image"][[0, 2, 3, 4, 5]])


def test_nothing_left_out_is_the_same_tensor(data):
    assert ReduceConditionsd(spatial_channels=NAMES)(data)["image"] is data["image"]


def test_a_name_that_is_no_channel_is_refused():
    with pytest.raises(CaseError, match="beam_mid.*the channels are ct"):
        ReduceConditionsd(spatial_channels=NAMES, left_out=["beam_mid"])


def test_what_the_context_says_of_it_goes_too(data):
    data["context"] = torch.tensor([2.0, 3.0, 5.0])
    reduce = ReduceConditionsd(spatial_channels=NAMES, left_out=["plan_"],
                               context_channels=["volume_body", "plan_mean_Heart", "plan_mean_Parotid_L"])
    out = reduce(data)
    assert out["context"].tolist() == [2.0, 0.0, 0.0] and data["context"].tolist() == [2.0, 3.0, 5.0]
    assert (out["image"][4] == 0).all() and torch.equal(out["image"][:4], data["image"][:4])
