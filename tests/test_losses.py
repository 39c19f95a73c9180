"""Losses against numpy."""

import numpy as np
import pytest
import torch

from custom.case import CaseError
from custom.losses import criteria_dvh_l1, gradient_l1, masked_l1, percentile, sorted_dvh_l1


@pytest.fixture
def doses():
    generator = torch.Generator().manual_seed(0)
    pred, ref = torch.rand(2, 2, 1, 6, 7, 8, generator=generator)
    rois = torch.rand(2, 3, 6, 7, 8, generator=generator) > 0.6
    return pred, ref, rois


def test_masked_l1_is_the_mean_of_patient_means(doses):
    pred, ref, rois = doses
    mask = rois[:, :1]
    expected = np.mean([float((pred[b] - ref[b]).abs()[mask[b]].mean()) for b in range(2)])
    assert float(masked_l1(pred, ref, mask.to(torch.uint8))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("q", [0, 1, 5, 37.3, 99, 100])
@pytest.mark.parametrize("n", [1, 2, 5, 100])
def test_percentile_is_numpys(q, n):
    values = np.sort(np.random.default_rng(0).random(n))
    assert float(percentile(torch.from_numpy(values), q)) == pytest.approx(np.percentile(values, q), rel=1e-6)


def test_criteria_are_openkbps(doses):
    pred, ref, rois = doses
    voxel_cc = [0.035, 0.3]
    expected = []
    for b in range(2):
        for r, target in enumerate((True, False, False)):
            a, c = pred[b, 0][rois[b, r]].numpy(), ref[b, 0][rois[b, r]].numpy()
            if target:
                expected += [abs(np.percentile(a, q) - np.percentile(c, q)) for q in (1, 5, 99)]
            else:
                q = 100 - max(1, round(100 / (1000 * voxel_cc[b]))) / len(a) * 100
                expected += [abs(np.percentile(a, q) - np.percentile(c, q)), abs(a.mean() - c.mean())]
    loss = criteria_dvh_l1(pred, ref, rois, [True, False, False], torch.tensor(voxel_cc))
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-4)


def test_sorted_dvh_sees_the_histogram_only(doses):
    pred, _, rois = doses
    assert float(sorted_dvh_l1(pred, pred + 0.1, rois)) == pytest.approx(0.1, rel=1e-5)
    everywhere = torch.ones(2, 1, 6, 7, 8)
    shuffled = pred.flatten(1)[:, torch.randperm(6 * 7 * 8)].reshape(pred.shape)
    assert float(sorted_dvh_l1(pred, shuffled, everywhere)) == pytest.approx(0, abs=1e-7)


def test_gradient_l1_of_a_ramp_is_a_third_of_its_slope():
    ramp = 0.3 * torch.arange(6.0).reshape(1, 1, 6, 1, 1).expand(1, 1, 6, 7, 8)
    assert float(gradient_l1(ramp, torch.zeros_like(ramp), torch.ones_like(ramp))) == pytest.approx(0.1, rel=1e-5)
    assert float(gradient_l1(ramp + 5, ramp, torch.ones_like(ramp))) == pytest.approx(0, abs=1e-5)


def test_empty_structures_cost_nothing(doses):
    pred, ref, rois = doses
    pred.requires_grad_()
    empty = torch.zeros_like(rois)
    loss = sorted_dvh_l1(pred, ref, empty) + criteria_dvh_l1(pred, ref, empty, [True, False, False], [0.1, 0.1])
    (loss + masked_l1(pred, ref, empty[:, :1])).backward()
    assert float(loss) == 0 and float(pred.grad.abs().sum()) == 0
    both = torch.cat([rois, empty], dim=1)
    torch.testing.assert_close(sorted_dvh_l1(pred, ref, both), sorted_dvh_l1(pred, ref, rois))


def test_gradient_stays_in_the_structure(doses):
    pred, ref, rois = doses
    pred.requires_grad_()
    sorted_dvh_l1(pred, ref, rois[:, :1]).backward()
    assert float(pred.grad[~rois[:, :1]].abs().sum()) == 0 and float(pred.grad.abs().sum()) > 0


def test_sizes_must_agree(doses):
    pred, ref, _ = doses
    with pytest.raises(CaseError, match="one size"):
        masked_l1(pred, ref, torch.ones(2, 1, 5, 7, 8))
