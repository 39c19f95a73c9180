"""Noise of the diffusion: variance and correlation as asked for, and the residual's scale by dose."""

from __future__ import annotations

import math

import pytest
import torch

from custom.case import CaseError
from custom.inferers import DoseDiffusionInferer, sample_x0
from custom.networks.addiff_dose import ADDiffDose
from custom.networks.blocks import NoiseSchedule
from custom.networks.noise import CorrelatedNoise, ScaleOfDose, draw_noise


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_voxel_has_unit_variance_at_the_edges_too():
    noise = CorrelatedNoise([0, 1.5, 6], [0.2, 0.3, 0.5]).draw((4000, 7, 5, 6), seeded())
    variance = noise.square().mean(0)  # its standard error is sqrt(2 / 4000) = 0.022
    assert float((variance - 1).abs().max()) < 0.11
    assert float(variance.mean()) == pytest.approx(1, abs=0.05)  # half of it is nearly alike in all voxels


def test_neighbours_are_correlated_as_gaussians_are():
    scales, shares = [1.0, 3.0], [0.25, 0.75]
    noise = CorrelatedNoise(scales, [1, 3]).draw((60, 40, 40, 24), seeded())[:, 8:-8, 8:-8, 8:-8]
    for lag in (1, 2, 4):
        expected = sum(w * math.exp(-(lag**2) / (4 * s**2)) for s, w in zip(scales, shares))
        found = float((noise[:, lag:] * noise[:, :-lag]).mean() / noise.square().mean())
        assert found == pytest.approx(expected, abs=0.03)


def test_noise_repeats_under_a_seed_and_is_white_without_an_own_one():
    noise = CorrelatedNoise([1, 4], [1, 1])
    first = noise.draw((2, 1, 6, 7, 8), seeded(3))
    torch.testing.assert_close(first, noise.draw((2, 1, 6, 7, 8), seeded(3)), rtol=0, atol=0)
    assert first.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(noise.draw((2, 1, 6, 7, 8), seeded(3)), first, rtol=0, atol=0)
    white = torch.randn(3, 4, 5, generator=seeded(5))
    torch.testing.assert_close(draw_noise(torch.nn.Identity(), (3, 4, 5), seeded(5)), white, rtol=0, atol=0)


def test_voxels_of_the_same_beams_err_alike_and_others_do_not():
    """Two beams on the left, one of them alone in the middle, the third on the right; far wider than they lie apart."""
    beams = torch.zeros(1, 3, 9, 2, 2)
    beams[:, 0, :6], beams[:, 1, :3], beams[:, 2, 6:] = 0.3, 0.4, 0.5
    drawn = CorrelatedNoise([50.0], [1], elsewhere=1e-6).draw((1, 20000, 9, 2, 2), seeded(), beams)[0, :, :, 0, 0]
    found = torch.corrcoef(drawn.T)
    sigma = drawn.std(0)
    torch.testing.assert_close(sigma, torch.ones(9), rtol=0, atol=0.03)
    assert float(found[0, 2]) == pytest.approx(1, abs=0.01)  # both beams, at two voxels' distance
    assert float(found[1, 4]) == pytest.approx(0.6, abs=0.03)  # 0.3 of 0.5 is from the beam they share
    assert float(found[4, 7]) == pytest.approx(0, abs=0.03)
    assert float(found[0, 8]) == pytest.approx(0, abs=0.03)


def test_where_no_beam_is_the_noise_is_one_field():
    noise, shape = CorrelatedNoise([1, 2], [1, 1]), (1, 2, 6, 5, 4)
    of_none = noise.draw(shape, seeded(2), torch.zeros(1, 0, 6, 5, 4))
    torch.testing.assert_close(of_none, noise.draw(shape, seeded(2)), rtol=0, atol=0)
    torch.testing.assert_close(noise.draw(shape, seeded(2), torch.zeros(1, 4, 6, 5, 4)), of_none)


def test_correlation_is_that_of_what_is_drawn():
    noise, shape = CorrelatedNoise([0, 1, 3], [0.2, 0.3, 0.5]), (5, 4, 3)
    beams = torch.rand(1, 3, *shape, generator=seeded(1)) * (torch.rand(1, 3, *shape, generator=seeded(2)) > 0.5)
    drawn = noise.draw((1, 20000, *shape), seeded(), beams).flatten(2)[0]
    places = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij"), -1).flatten(0, 2)
    inner = (places[:, 0] == 2) | (places[:, 0] == 3)  # not the volume's ends, where the filters are cut
    expected = noise.correlation(places[inner], beams[0].flatten(1).T[inner])
    assert float((expected.diagonal() - 1).abs().max()) < 1e-5
    assert float((torch.corrcoef(drawn.T)[inner][:, inner] - expected).abs().mean()) < 0.03


class OfThatNoise(torch.nn.Module):
    """Ideal denoiser of data that are themselves such noise, times ``std``: a number at each time step."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std, self.schedule, self.noise = std, NoiseSchedule(), CorrelatedNoise([1], [1])

    def denoise(self, x_t, t, conditions):
        a, s = self.schedule.scales(t)
        return a * self.std**2 / (a**2 * self.std**2 + s**2) * x_t


@pytest.mark.parametrize("steps", [4, 8, 1000])
def test_sampling_gives_data_of_the_noises_correlation(steps):
    network, generator = OfThatNoise(0.5), seeded()
    x0 = sample_x0(network, draw_noise(network, (1, 1, 24, 24, 24), generator), None, steps, generator)
    middle = x0[..., 2:-2, 2:-2, 2:-2]
    correlation = float((middle[..., 1:] * middle[..., :-1]).mean() / middle.square().mean())
    assert correlation == pytest.approx(math.exp(-1 / 4), abs=0.03)
    assert float(middle.std()) == pytest.approx(0.5, rel=0.1)  # a thousand independent pieces, about


def test_scale_is_linear_between_points_and_constant_beyond():
    scale = ScaleOfDose([[0.0, 0.01], [0.5, 0.05], [1.0, 0.03]])
    found = scale(torch.tensor([-0.2, 0.0, 0.25, 0.5, 0.75, 1.0, 1.3]))
    torch.testing.assert_close(found, torch.tensor([0.01, 0.01, 0.03, 0.05, 0.04, 0.03, 0.03]))
    torch.testing.assert_close(ScaleOfDose(0.05)(torch.rand(2, 3)), torch.full((2, 3), 0.05))


def test_dose_of_a_residual_and_back():
    small = {"channels": [4, 8], "encoder_blocks": [1, 1], "decoder_blocks": [1]}
    network = ADDiffDose(
        ["body", "plan_prior"], prior=small, denoiser={**small, "attention_levels": []}, structure_widths=None,
        residual_scale=[[0.1, 0.02], [0.9, 0.06]], noise={"scales_voxels": [2], "shares": [1]},
    ).eval()  # fmt: skip
    image = torch.rand(1, 2, 8, 8, 8, generator=seeded())
    image[:, 0] = 1.0
    conditions = network.encode(image)
    torch.testing.assert_close(conditions.prior, image[:, 1:])  # an untrained correction is none
    dose = torch.rand(1, 1, 8, 8, 8, generator=seeded(1))
    x0 = network.from_dose(dose, conditions)
    torch.testing.assert_close(network.to_dose(x0, conditions), dose)
    expected = (dose - image[:, 1:]) / (0.02 + 0.05 * (image[:, 1:].clamp(0.1, 0.9) - 0.1))
    torch.testing.assert_close(x0, expected)


def test_the_networks_beams_shape_its_noise():
    small = {"channels": [4, 8], "encoder_blocks": [1, 1], "decoder_blocks": [1]}
    network = ADDiffDose(
        ["body", "plan_prior", "plan_beam_0", "plan_beam_40"], prior=small, denoiser={**small, "attention_levels": []},
        structure_widths=None, noise={"scales_voxels": [2], "shares": [1]},
    ).eval()  # fmt: skip
    image = torch.rand(1, 4, 7, 6, 5, generator=seeded())
    torch.testing.assert_close(network.noise_beams(image), image[:, 2:])
    torch.testing.assert_close(network.encode(image).beams, image[:, 2:])
    start = DoseDiffusionInferer(num_inference_steps=4, seed=3)._start(image, network, seeded(3))
    torch.testing.assert_close(start, network.noise.draw((1, 1, 7, 6, 5), seeded(3), image[:, 2:]), rtol=0, atol=0)
    assert (start - network.noise.draw((1, 1, 7, 6, 5), seeded(3))).abs().max() > 0.1


@pytest.mark.parametrize("scales, shares", [([], []), ([1, 2], [1]), ([-1], [1]), ([1, 2], [1, 0])])
def test_parts_that_do_not_fit_are_refused(scales, shares):
    with pytest.raises(CaseError, match="scales_voxels"):
        CorrelatedNoise(scales, shares)


@pytest.mark.parametrize("scale", [0, [], [[0.5, 0.1], [0.2, 0.1]], [[0.0, 0.1], [0.5, 0.0]], [[0.0, 0.1, 0.2]]])
def test_impossible_scales_are_refused(scale):
    with pytest.raises(CaseError, match="residual_scale"):
        ScaleOfDose(scale)
