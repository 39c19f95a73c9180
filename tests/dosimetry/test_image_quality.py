"""PSNR, SSIM and fine structure on doses whose answer is known."""

import numpy as np
import pytest
from scipy import ndimage
from skimage.metrics import structural_similarity

from custom.dosimetry.image_quality import fine_structure_ratio, psnr_db, similarity, ssim


@pytest.fixture
def doses():
    rng = np.random.default_rng(0)
    reference = ndimage.gaussian_filter(rng.normal(size=(24, 22, 20)), 2) * 100 + 30
    return reference, reference + ndimage.gaussian_filter(rng.normal(size=reference.shape), 1) * 5


def test_a_constant_error_of_a_tenth_of_the_range_is_20_db(doses):
    body = np.ones(doses[0].shape, bool)
    body[0] = False
    shifted = doses[0] + np.where(body, 7.0, 1e6)
    assert psnr_db(shifted, doses[0], body, 70.0) == pytest.approx(20.0)


def test_equal_doses(doses):
    body = np.ones(doses[0].shape, bool)
    assert psnr_db(doses[0], doses[0], body, 70.0) == np.inf
    assert ssim(doses[0], doses[0], body, 70.0) == pytest.approx(1.0)
    assert fine_structure_ratio(doses[0], doses[0], body, (1, 1, 1)) == pytest.approx(1.0)


def test_ssim_is_scikit_images(doses):
    body = np.ones(doses[0].shape, bool)
    _, full = structural_similarity(*doses, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                    data_range=70.0, full=True)
    assert ssim(doses[1], doses[0], body, 70.0) == pytest.approx(full.mean(), abs=1e-9)


def test_fine_structure_is_the_filters_gain_at_one_frequency():
    period, sigma = 12.0, 6.0
    x = np.arange(240)
    wave = np.broadcast_to(np.sin(2 * np.pi * x / period)[:, None, None], (240, 3, 3))
    body = np.zeros(wave.shape, bool)
    body[60:180] = True
    # half the amplitude is a quarter of the energy, whatever the filter takes
    assert fine_structure_ratio(0.5 * wave, wave, body, (1, 1, 1), sigma) == pytest.approx(0.25, rel=1e-5)
    # a wave ten times as long is passed by the filter to 1 - exp(-(2 pi sigma / period)^2 / 2)
    slow = np.broadcast_to(np.sin(2 * np.pi * x / 60.0)[:, None, None], wave.shape)
    gain = [1 - np.exp(-0.5 * (2 * np.pi * sigma / p) ** 2) for p in (60.0, period)]
    assert fine_structure_ratio(slow, wave, body, (1, 1, 1), sigma) == pytest.approx((gain[0] / gain[1]) ** 2, rel=2e-2)


def test_no_body_is_not_applicable(doses):
    none = np.zeros(doses[0].shape, bool)
    assert np.isnan(psnr_db(*doses, none, 70.0)) and np.isnan(ssim(*doses, none, 70.0))


def test_similarity_on_the_box_is_that_of_the_whole_volume():
    rng = np.random.default_rng(3)
    body = np.zeros((30, 34, 28), bool)
    body[10:19, 12:20, 0:15] = True
    reference = rng.random(body.shape) * body * 70
    dose = reference + rng.random(body.shape) * body
    found = similarity(dose, reference, body, 70.0)
    assert found == pytest.approx({"psnr_db": psnr_db(dose, reference, body, 70.0),
                                   "ssim": ssim(dose, reference, body, 70.0)})
