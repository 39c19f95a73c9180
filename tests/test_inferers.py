"""The samplers solve a problem with a known answer: Gaussian data, whose ideal denoiser is known in closed form."""

import pytest
import torch
from torch import nn

from custom.case import CaseError
from custom.inferers import (
    DoseDiffusionInferer,
    LinearDecaySlidingWindowInferer,
    few_step_plan,
    linear_decay_map,
    sample_x0,
)
from custom.networks.addiff_dose import ADDiffDose
from custom.networks.blocks import NoiseSchedule


class IdealDenoiser(nn.Module):
    """E[x_0 | x_t] for x_0 ~ N(mean, std^2), every voxel on its own."""

    def __init__(self, mean: float, std: float, steps: int = 1000) -> None:
        super().__init__()
        self.schedule = NoiseSchedule(steps)
        self.mean, self.std = mean, std
        self.denoiser = self

    def denoise(self, x_t, t, conditions):
        a, s = self.schedule.scales(t)
        gain = self.std**2 * a / (a**2 * self.std**2 + s**2)
        return self.mean + gain * (x_t - a * self.mean)

    def encode(self, image):
        return image

    def to_dose(self, x0, conditions):
        return x0


@pytest.mark.parametrize("steps", [3, 4, 8, 20])
@pytest.mark.parametrize("std", [0.25, 0.5, 1.0])
def test_few_steps_recover_mean_and_std(steps, std):
    noise = torch.randn(1, 1, 40, 40, 40, generator=torch.Generator().manual_seed(0))
    x0 = sample_x0(IdealDenoiser(0.5, std), noise, None, steps)
    assert float(x0.mean()) == pytest.approx(0.5, abs=0.05 * std)
    assert float(x0.std()) == pytest.approx(std, rel=0.05)


def test_all_steps_are_ddpm():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, 24, 24, 24, generator=generator)
    x0 = sample_x0(IdealDenoiser(0.5, 0.25), noise, None, 1000, generator)
    assert float(x0.mean()) == pytest.approx(0.5, abs=0.0125)
    assert float(x0.std()) == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 16])
def test_data_without_spread_is_exact(steps):
    noise = torch.randn(1, 1, 4, 4, 4)
    torch.testing.assert_close(sample_x0(IdealDenoiser(0.3, 0.0), noise, None, steps), torch.full_like(noise, 0.3))


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50, 999])
def test_plan_starts_at_the_end_and_falls(steps):
    timesteps, weights = few_step_plan(NoiseSchedule(), steps)
    assert timesteps[0] == 999
    assert all(a > b for a, b in zip(timesteps, timesteps[1:]))
    assert len(weights) == len(timesteps) <= steps


def test_impossible_number_of_steps_is_refused():
    with pytest.raises(CaseError, match="num_inference_steps 0"):
        few_step_plan(NoiseSchedule(), 0)


def test_seed_repeats_and_samples_differ():
    inferer = DoseDiffusionInferer(num_inference_steps=4, num_samples=3, seed=7)
    image, network = torch.zeros(1, 2, 8, 8, 8), IdealDenoiser(0.5, 0.25)
    first = inferer.sample(image, network)
    assert first.shape == (3, 1, 1, 8, 8, 8)
    torch.testing.assert_close(first, inferer.sample(image, network), rtol=0, atol=0)
    assert not torch.equal(first[0], first[1])
    mean, std = inferer.mean_and_std(image, network)
    torch.testing.assert_close(mean, first.mean(0))
    torch.testing.assert_close(std, first.std(0))


def test_dose_of_one_step_beside_the_samples_spread():
    """The deterministic step gives the data's mean exactly; the spread is still that of the samples."""
    options = dict(num_inference_steps=4, num_samples=5, seed=7, with_std=True)
    image, network = torch.zeros(1, 2, 8, 8, 8), IdealDenoiser(0.5, 0.25)
    of_samples = DoseDiffusionInferer(**options)(image, network)
    of_one_step = DoseDiffusionInferer(**options, mean_of_samples=False)(image, network)
    torch.testing.assert_close(of_one_step[:, 1:], of_samples[:, 1:])
    torch.testing.assert_close(of_one_step[:, :1], DoseDiffusionInferer()(image, network))
    assert float((of_samples[:, :1] - of_one_step[:, :1]).abs().mean()) > 0.02  # 0.25 sqrt(2 / (5 pi)), about


def test_flips_of_a_sample_start_from_the_same_noise():
    """A network that knows no left from right gives the same sample with the flip: the mean takes nothing from it."""
    image, network = torch.zeros(1, 2, 8, 6, 5), IdealDenoiser(0.5, 0.25)
    options = dict(num_inference_steps=4, num_samples=3, seed=7)
    plain = DoseDiffusionInferer(**options).sample(image, network)
    flipped = DoseDiffusionInferer(**options, flips=[[0]], condition_channels=["a", "b"]).sample(image, network)
    torch.testing.assert_close(flipped, plain)


def test_one_step_of_one_sample_is_deterministic():
    dose = DoseDiffusionInferer(seed=None)(torch.zeros(1, 2, 4, 4, 4), IdealDenoiser(0.5, 0.25))
    assert float(dose.std()) < 1e-6


@pytest.fixture
def with_prior() -> ADDiffDose:
    """A network with a prior and a denoiser, neither of which answers nothing."""
    torch.manual_seed(0)
    small = {"channels": [4, 8], "encoder_blocks": [1, 1], "decoder_blocks": [1]}
    network = ADDiffDose(
        ["ct", "body", "plan_prior"],
        prior=small,
        denoiser={**small, "attention_levels": []},
        structure_widths=None,
        detail_channels=["plan_prior", "body"],
        one_step="prior",
    ).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@torch.no_grad()
def test_one_step_leaves_the_prior_as_it_is_and_more_steps_do_not(with_prior):
    image = torch.rand(1, 3, 16, 16, 16)
    image[:, 1] = 1.0
    prior = with_prior.predict_prior(image)
    with_prior.one_step_is_prior = False
    denoised = DoseDiffusionInferer()(image, with_prior)
    with_prior.one_step_is_prior = True
    for inferer in (DoseDiffusionInferer(), DoseDiffusionInferer(prior_roi_size=[16] * 3)):
        torch.testing.assert_close(inferer(image, with_prior), prior, rtol=1e-6, atol=0)
    assert torch.equal(with_prior(image), prior)
    for other in (denoised, DoseDiffusionInferer(num_inference_steps=2)(image, with_prior),
                  DoseDiffusionInferer(stochastic=True)(image, with_prior)):
        assert float((other - prior).abs().max()) > 1e-3


@torch.no_grad()
def test_windows_do_not_change_the_one_step_dose(with_prior):
    """The prior has windows of its own, and nothing else is predicted."""
    image = torch.rand(1, 3, 24, 24, 24)
    options = dict(prior_roi_size=[16] * 3, prior_overlap_voxels=8)
    whole = DoseDiffusionInferer(**options)(image, with_prior)
    windows = DoseDiffusionInferer(**options, roi_size=[16] * 3, overlap_voxels=4)(image, with_prior)
    torch.testing.assert_close(windows, whole, rtol=0, atol=1e-6)


def test_windows_start_from_the_noise_of_the_whole_volume():
    """Where windows overlap, the mean of two draws would have less spread than either."""
    image, network = torch.zeros(1, 2, 24, 24, 24), IdealDenoiser(0.5, 0.25)
    options = dict(num_inference_steps=4, num_samples=2)
    whole = DoseDiffusionInferer(**options).sample(image, network)
    windows = DoseDiffusionInferer(**options, roi_size=[16] * 3, overlap_voxels=8).sample(image, network)
    torch.testing.assert_close(windows, whole, rtol=0, atol=1e-5)
    assert float((whole[0] - whole[1]).abs().mean()) > 0.1


@pytest.mark.parametrize(("prior", "one_step"), [(None, "prior"), ({"channels": [4, 8]}, "mean")])
def test_one_step_is_told_when_it_cannot_be(prior, one_step):
    with pytest.raises(CaseError, match="expected 'denoiser', or 'prior' where there is one"):
        ADDiffDose(["body"], prior=prior, denoiser={"channels": [4, 8]}, one_step=one_step)


class Spatial(nn.Module):
    """Weighs each channel by its place and answers with a ramp along the first axis added, to see flips and swaps."""

    def forward(self, image):
        weights = torch.arange(1.0, image.shape[1] + 1).reshape(1, -1, 1, 1, 1)
        return (image * weights).sum(1, keepdim=True)


def test_left_right_flip_swaps_paired_channels():
    image = torch.rand(1, 3, 4, 4, 4)
    inferer = DoseDiffusionInferer(flips=[[0]], condition_channels=["ct", "L", "R"], swap_channels=[["L", "R"]])
    swapped = image[:, [0, 2, 1]]
    torch.testing.assert_close(inferer(image, Spatial()), (Spatial()(image) + Spatial()(swapped)) / 2)


def test_flips_of_other_axes_do_not_swap():
    image = torch.rand(2, 3, 4, 4, 4)
    inferer = DoseDiffusionInferer(flips=[[2], [1, 2]])
    torch.testing.assert_close(inferer(image, Spatial()), Spatial()(image))


def test_unknown_swap_channel_is_named():
    with pytest.raises(CaseError, match="Parotid_X"):
        DoseDiffusionInferer(condition_channels=["a"], swap_channels=[["a", "Parotid_X"]])


def test_linear_decay_weights_of_neighbours_add_up_to_one():
    weight = linear_decay_map((32, 32, 24), (8, 8, 8))
    line = weight[:, 16, 12]
    torch.testing.assert_close(line[-8:] + line[:8], torch.ones(8))
    assert float(line[16]) == 1.0 and (line[:8].diff() > 0).all()


def test_windows_reproduce_a_local_network():
    image = torch.rand(1, 3, 50, 37, 30)
    inferer = DoseDiffusionInferer(roi_size=[32, 32, 24], overlap_voxels=8)
    torch.testing.assert_close(inferer(image, Spatial()), Spatial()(image))


class Shrinking(nn.Module):
    """A prior that depends on all it sees, as instance norms do: the image less its mean; no residual is diffused."""

    denoiser = None

    def forward(self, image):
        return image[:, :1] - image[:, :1].mean()



class Corrected(IdealDenoiser):
    """That prior, and a denoiser that knows the residual to be 0.25 everywhere."""

    prior = "has one"

    def __init__(self):
        super().__init__(0.25, 0.0)

    def predict_prior(self, image):
        return Shrinking()(image)

    def encode(self, image, prior=None):
        return self.predict_prior(image) if prior is None else prior

    def to_dose(self, x0, conditions):
        return conditions + x0


class Blended(Corrected):
    """That network, with a branch that wants the whole patient."""

    sees_whole = True

    def blend(self, prior, image):
        return prior + image.shape[2]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("windows", [{}, {"roi_size": [11, 8, 8], "overlap_voxels": 3}])
@pytest.mark.parametrize("apart", [{}, {"prior_roi_size": [8, 8, 8], "prior_overlap_voxels": 4}])
def test_the_broad_branch_sees_the_whole_patient_whatever_the_windows(steps, windows, apart):
    image = torch.rand(1, 1, 20, 9, 8)
    without = DoseDiffusionInferer(steps, **apart)(image, Corrected())
    torch.testing.assert_close(DoseDiffusionInferer(steps, **windows, **apart)(image, Blended()), without + 20)


def test_prior_window_sees_patches_as_in_training():
    image = torch.rand(1, 1, 12, 8, 5)
    inferer = DoseDiffusionInferer(prior_roi_size=[8, 8, 8], prior_overlap_voxels=4)
    left, right = (Shrinking()(image[:, :, part]) for part in (slice(0, 8), slice(4, 12)))  # as short as the last axis
    ramp = (torch.arange(1, 5) / 5).reshape(1, 1, 4, 1, 1)
    expected = torch.cat([left[:, :, :4], left[:, :, 4:] * (1 - ramp) + right[:, :, :4] * ramp, right[:, :, 4:]], dim=2)
    torch.testing.assert_close(inferer(image, Shrinking()), expected)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_windowed_prior_is_what_the_denoiser_corrects(steps):
    image = torch.rand(1, 1, 12, 8, 8) + torch.arange(12.0).reshape(-1, 1, 1)  # windows differ in their mean
    windowed = DoseDiffusionInferer(steps, prior_roi_size=[8, 8, 8], prior_overlap_voxels=4)
    prior = windowed(image, Shrinking())
    torch.testing.assert_close(windowed(image, Corrected()), prior + 0.25)
    whole = DoseDiffusionInferer(steps)(image, Corrected())
    torch.testing.assert_close(whole, Shrinking()(image) + 0.25)
    assert float((whole - prior - 0.25).abs().max()) > 0.01


@pytest.mark.parametrize("steps", [1, 3])
def test_windows_of_the_image_get_their_part_of_the_one_prior(steps):
    image = torch.rand(1, 1, 20, 9, 8) + torch.arange(20.0).reshape(-1, 1, 1)
    prior = {"prior_roi_size": [8, 8, 8], "prior_overlap_voxels": 4, "stochastic": False}
    whole = DoseDiffusionInferer(steps, **prior)(image, Corrected())
    in_windows = DoseDiffusionInferer(steps, roi_size=[11, 8, 8], overlap_voxels=3, **prior)(image, Corrected())
    torch.testing.assert_close(in_windows, whole)


def test_windows_blend_linearly():
    """Two windows that answer 0 and 1 meet in a straight ramp over the overlap."""
    answers = iter([0.0, 1.0])
    inferer = LinearDecaySlidingWindowInferer((8, 8, 8), 4)
    blended = inferer(torch.zeros(1, 1, 12, 8, 8), lambda patch: torch.full_like(patch, next(answers)))
    expected = torch.cat([torch.zeros(4), torch.arange(1, 5) / 5, torch.ones(4)])
    torch.testing.assert_close(blended[0, 0, :, 4, 4], expected)
