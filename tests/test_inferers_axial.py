"""Axial inference: the batch of slices changes nothing, noise belongs to the volume, samples and flips as elsewhere."""

from __future__ import annotations

import pytest
import torch

from custom.case import CaseError
from custom.inferers_axial import AxialSliceInferer
from custom.networks.dosediff import DoseDiff

CHANNELS = ["ct", "psdm_Parotid_L", "psdm_Parotid_R", "body", "prescription_level"]


def make_network(halo: int = 0) -> DoseDiff:
    torch.manual_seed(0)
    network = DoseDiff(CHANNELS, network={"channels": [8, 8], "blocks": 1, "embedding_dim": 8, "fusion_dim": 6})
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    network.halo = halo
    return network.eval()


def make_image(depth: int = 7) -> torch.Tensor:
    image = torch.rand(1, len(CHANNELS), 9, 12, depth, generator=torch.Generator().manual_seed(1))
    image[:, 3:] = 1.0
    return image


@pytest.mark.parametrize("halo", [0, 1])
@pytest.mark.parametrize("options", [{}, {"eta": 1.0}, {"num_samples": 2, "with_std": True}], ids=str)
def test_slices_a_batch_change_nothing(options, halo):
    image, network = make_image(), make_network(halo)
    whole = AxialSliceInferer(3, slices_per_batch=99, **options)(image, network)
    assert whole.shape == (1, 1 + options.get("with_std", False), 9, 12, 7)
    for size in (1, 3):
        torch.testing.assert_close(AxialSliceInferer(3, slices_per_batch=size, **options)(image, network), whole,
                                   atol=1e-5, rtol=1e-4)


def test_seed_repeats_and_changes_the_dose():
    image, network = make_image(3), make_network()
    first = AxialSliceInferer(2, seed=4)(image, network)
    assert torch.equal(first, AxialSliceInferer(2, seed=4)(image, network))
    assert not torch.allclose(first, AxialSliceInferer(2, seed=5)(image, network))
    assert not torch.allclose(first, AxialSliceInferer(2, seed=4, eta=1.0)(image, network))


def test_one_step_from_zero_is_the_networks_own_answer():
    image, network = make_image(3), make_network()
    with torch.no_grad():
        torch.testing.assert_close(AxialSliceInferer(1, stochastic=False)(image, network), network(image),
                                   atol=1e-5, rtol=1e-4)


def test_flip_swaps_the_sides():
    image, network = make_image(2), make_network()
    pair = [["psdm_Parotid_L", "psdm_Parotid_R"]]
    options = {"stochastic": False, "condition_channels": CHANNELS, "swap_channels": pair}
    mirrored = torch.flip(image, [2])[:, [0, 2, 1, 3, 4]]
    plain = AxialSliceInferer(1, **options)
    expected = (plain(image, network) + torch.flip(plain(mirrored, network), [2])) / 2
    torch.testing.assert_close(AxialSliceInferer(1, flips=[[0]], **options)(image, network), expected)


def test_both_flips_start_from_the_same_noise_flipped(monkeypatch):
    image, network = make_image(4), make_network()
    monkeypatch.setattr("custom.inferers_axial.ddim_sample", lambda network, start, *_: start)
    monkeypatch.setattr(network, "to_dose", lambda x0, conditions: x0)
    options = {"num_samples": 2, "slices_per_batch": 3, "condition_channels": CHANNELS}
    plain = AxialSliceInferer(**options).sample(image, network)
    assert plain.std() > 0.5 and not torch.equal(plain[0], plain[1])
    torch.testing.assert_close(AxialSliceInferer(flips=[[0], [1]], **options).sample(image, network), plain)


def test_spread_of_samples_is_that_of_single_ones():
    image, network = make_image(2), make_network()
    samples = AxialSliceInferer(2, num_samples=3).sample(image, network)
    assert samples.shape == (3, 1, 1, 9, 12, 2) and not torch.allclose(samples[0], samples[1])
    mean, std = AxialSliceInferer(2, num_samples=3).mean_and_std(image, network)
    torch.testing.assert_close(mean, samples.mean(0))
    torch.testing.assert_close(std, samples.std(0))


def test_no_slices_is_an_error():
    with pytest.raises(CaseError, match="slices_per_batch 0"):
        AxialSliceInferer(slices_per_batch=0)
