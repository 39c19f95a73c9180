"""A larger network that takes a smaller one's weights begins as the same function."""

import pytest
import torch

from custom.networks.addiff_dose import ADDiffDose
from custom.networks.growth import grow

CONTEXT = ["has_ct"]
SPATIAL = ["ct", "body", "plan_prior", "sdm_target_high"]
DENOISER = {"channels": [8, 16], "encoder_blocks": [1, 1], "decoder_blocks": [1], "attention_levels": [1],
            "embedding_dim": 16}


def network(further=(), blocks=(1, 1), widths=(8, 16), context=CONTEXT) -> ADDiffDose:
    torch.manual_seed(len(further))
    prior = {"channels": widths, "encoder_blocks": blocks, "decoder_blocks": [1], "embedding_dim": 16}
    made = ADDiffDose([*SPATIAL, *further, *context], context, prior=prior, denoiser=DENOISER, structure_widths=[8, 8])
    with torch.no_grad():  # layers that start at zero would hide what they are given
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return made.eval()


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.rand(1, len(SPATIAL) + len(CONTEXT), 16, 16, 16)


def with_further(image: torch.Tensor, count: int) -> torch.Tensor:
    """Further spatial channels before the context."""
    return torch.cat([image[:, :-1], torch.rand(1, count, *image.shape[2:]), image[:, -1:]], dim=1)


@torch.no_grad()
def test_further_blocks_and_channels_change_nothing_at_first(image):
    small = network()
    large = network(["plan_prior_sparing", "plan_prior_coverage"], blocks=(2, 4))
    taken = grow(large, small.state_dict())
    assert set(taken) == set(small.state_dict())
    assert torch.allclose(large(with_further(image, 2)), small(image), atol=1e-5)
    wise = network(["plan_prior_sparing"], context=[*CONTEXT, "overlap_Parotid_L"])
    grow(wise, small.state_dict())
    knowing = torch.cat([with_further(image, 1), torch.full_like(image[:, :1], 0.3)], dim=1)
    assert torch.allclose(wise(knowing), small(image), atol=1e-5)
    more = {name for name, _ in large.named_parameters()} - set(taken)
    assert more and all(name.startswith(("prior.unet.encoder.0.1.", "prior.unet.encoder.1.")) for name in more)


@torch.no_grad()
def test_corrections_of_beams_change_nothing_at_first(image):
    small, large = network(), network(["plan_beam_0", "plan_beam_40", "plan_beam_80"])
    taken = grow(large, small.state_dict())
    assert set(taken) == set(small.state_dict())
    assert taken["prior.unet.out.weight"].shape[0] == 4 * small.prior.unet.out.weight.shape[0]
    assert torch.allclose(large(with_further(image, 3)), small(image), atol=1e-5)


@torch.no_grad()
def test_a_broad_branch_that_does_not_fit_keeps_no_share():
    """Half of the dose from perceptrons that were not taken would be no dose."""
    context = ["has_ct", "spacing_x", "spacing_y", "spacing_z"]

    def broad(*further) -> ADDiffDose:
        spatial = [*SPATIAL, "prescription", *further]
        return ADDiffDose([*spatial, *context], context, broad={"width": 4, "members": 1},
                          prior={"channels": [8], "encoder_blocks": [1], "decoder_blocks": []})

    small, same, large = broad(), broad(), broad("plan_prior_sparing")
    small.broad.share.fill_(0.5)
    before = {name: value.clone() for name, value in large.broad.state_dict().items()}
    assert "broad.share" in grow(same, small.state_dict()) and same.broad.share == 0.5
    taken = grow(large, small.state_dict())
    assert "gain" in taken and not any(name.startswith("broad.") for name in taken)
    assert all(torch.equal(value, before[name]) for name, value in large.broad.state_dict().items())


def test_what_is_new_learns(image):
    large = network(["plan_prior_sparing"], blocks=(2, 3))
    grow(large, network().state_dict())
    large.train().predict_prior(with_further(image, 1)).abs().sum().backward()
    assert large.prior.unet.encoder[1][2].conv2.weight.grad.abs().sum() > 0
    assert large.prior.unet.down[0].weight.grad[:, len(SPATIAL)].abs().sum() > 0


@torch.no_grad()
def test_wider_levels_change_nothing_at_first(image):
    small, wide = network(), network(["plan_prior_sparing"], widths=(20, 32), blocks=(1, 2))
    taken = grow(wide, small.state_dict())
    assert set(taken) == set(small.state_dict())
    assert torch.allclose(wide(with_further(image, 1)), small(image), atol=1e-5)


def test_copies_of_a_channel_learn_apart(image):
    wide = network(widths=(16, 16))
    grow(wide, network().state_dict())
    wide.train().predict_prior(image).abs().sum().backward()
    gradient = wide.prior.unet.encoder[0][0].conv1.weight.grad
    assert not torch.allclose(gradient[:8], gradient[8:], rtol=0.01)


@torch.no_grad()
def test_every_process_grows_the_same_network():
    state, grown = network().state_dict(), []
    for seed in (1, 2):
        large = network(widths=(16, 32))
        torch.manual_seed(seed)  # each process of a training has one of its own
        grow(large, state)
        grown.append(large.state_dict())
    assert all(torch.equal(value, grown[1][name]) for name, value in grown[0].items())


def test_narrower_levels_keep_their_own_start():
    narrow, before = network(widths=(6, 16)), network(widths=(6, 16)).state_dict()
    taken = grow(narrow, network().state_dict())
    assert "prior.unet.encoder.0.0.conv1.weight" not in taken and "gain" in taken
    assert torch.equal(narrow.state_dict()["prior.unet.encoder.0.0.conv1.weight"],
                       before["prior.unet.encoder.0.0.conv1.weight"])
