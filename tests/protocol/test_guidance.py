"""Guidance: misses are taken away, what is met stays as it is, and off means off."""

import json

import numpy as np
import pytest
import torch

from custom.case import CaseError
from custom.dosimetry.constraints import _parse_row, check, compliance, load_constraints
from custom.inferers import DoseDiffusionInferer
from custom.networks.addiff_dose import ADDiffDose
from custom.protocol.conditions import case_from_conditions
from custom.protocol.guidance import Guidance, excess_gy
from custom.protocol.loss import ActiveRow

SHAPE = (24, 24, 12)
SPATIAL = ["ct", "body", "prescription", "sdm_target_high", "sdm_target_low", "sdm_SpinalCord", "sdm_Parotid_L",
           "sdm_Parotid_R"]
CONTEXT = ["prescription_level", "spacing_x", "spacing_y", "spacing_z", "is_lung", "is_vmat"]
NAMES = [*SPATIAL, *CONTEXT]


@pytest.fixture
def image():
    """A box of 4 x 4 x 5 mm voxels: target, cord below it, one parotid near and one far."""
    masks = {name: np.zeros(SHAPE, bool) for name in ("body", "high", "low", "cord", "left", "right")}
    masks["body"][1:-1, 1:-1] = True
    masks["high"][9:15, 8:13, 3:9] = True
    masks["low"][16:19, 8:13, 3:9] = True
    masks["cord"][11:13, 16:18] = True
    masks["left"][2:6, 7:11, 3:9] = True
    masks["right"][19:22, 14:18, 3:9] = True
    sdm = [np.where(masks[name], 0.1, -0.1) for name in ("high", "low", "cord", "left", "right")]
    painted = np.where(masks["high"], 1.0, np.where(masks["low"], 0.8, 0.0))
    context = [np.full(SHAPE, value) for value in (1.0, 1.0, 1.0, 1.25, 0.0, 0.0)]
    spatial = [np.zeros(SHAPE), masks["body"], painted, *sdm]
    return torch.from_numpy(np.stack([*spatial, *context]).astype(np.float32))[None]


@pytest.fixture
def dose(image):
    """72 Gy in the target, falling by 1.2 Gy a mm: the cord gets too much."""
    x, y, _ = np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij")
    away = np.hypot(np.maximum(np.abs(x - 13) - 5.5, 0), np.maximum(np.abs(y - 10) - 2.5, 0)) * 4
    gy = np.clip(72 - 1.2 * away, 5, None) * image[0, 1].numpy()
    return torch.from_numpy((gy / 70).astype(np.float32))[None, None]


def judged(dose, image, structure=None):
    case = case_from_conditions(image[0].numpy(), NAMES)
    rows = [row for row in load_constraints() if structure is None or row.structure == structure]
    return check(rows, case, 70 * dose[0, 0].double().numpy())


def test_the_cord_is_brought_below_its_limit_and_the_rest_stays(image, dose):
    (before,) = judged(dose, image, "SpinalCord")
    guidance = Guidance(NAMES, 1.0, structures=["SpinalCord"], sweeps=8)
    moved = guidance(dose, guidance.protocols(image))
    (after,) = judged(moved, image, "SpinalCord")
    assert before.value > 50 and after.value < 45.7  # the soft maximum, a mean of the hottest 2 %, is at its limit
    far = image[0, SPATIAL.index("sdm_Parotid_L")] > 0
    assert torch.equal(moved[0, 0][far], dose[0, 0][far])
    assert float(moved.min()) >= 0 and float(moved[0, 0][image[0, 1] == 0].abs().max()) == 0


def row_of(structure, metric, limit, direction="<="):
    row = {"structure": structure, "metric": metric, "direction": direction, "limit": limit, "weight": 1.0,
           "site": "any", "source": "test"}
    return _parse_row(row, 1, "test")


@pytest.mark.parametrize(("metric", "limit", "direction", "expected"), [
    ("Max[Gy]", 30, "<=", [0, 0, 10, 20]),
    ("Mean[Gy]", 25, "<=", [5, 5, 5, 5]),
    ("D50%[Gy]", 15, "<=", [0, 5, 0, 0]),  # the hotter half may be as hot as it likes
    ("D1cc[Gy]", 15, "<=", [0, 5, 25, 0]),
    ("V15Gy[%]", 25, "<=", [0, 5, 25, 0]),
    ("V15Gy[cc]", 2, "<=", [0, 5, 0, 0]),
    ("Min[Gy]", 25, ">=", [15, 5, 0, 0]),
    ("D75%[Gy]", 25, ">=", [0, 5, 0, 0]),  # the coldest quarter may be cold
    ("V25Gy[%]", 75, ">=", [0, 5, 0, 0]),
    ("V50%[%]", 100, ">=", [25, 15, 0, 0]),
    ("D75%[%]", 60, ">=", [0, 22, 2, 0]),
])
def test_excess_by_kind(metric, limit, direction, expected, monkeypatch):
    monkeypatch.setattr("custom.protocol.guidance.AIM_INSIDE", 0.0)
    row = ActiveRow(row_of("X", metric, limit, direction), "X", torch.arange(4), 1.0, 70.0, limit)
    assert excess_gy(row, torch.tensor([10.0, 20.0, 40.0, 50.0])).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("sweeps", [1, 4])
def test_more_strength_misses_less(image, dose, sweeps):
    missed = []
    for strength in (0.0, 0.1, 0.3, 1.0):
        guidance = Guidance(NAMES, strength, sweeps=sweeps)
        moved = guidance(dose, guidance.protocols(image))
        missed.append(sum(v.severity for v in judged(moved, image)))
        change = float((moved - dose).abs().max())
        assert (change == 0) == (strength == 0)
    assert missed == sorted(missed, reverse=True) and missed[-1] < (0.8 if sweeps == 1 else 0.5) * missed[0]


def test_a_dose_that_meets_the_protocol_is_not_moved(image, dose):
    cold = dose * 0.4
    guidance = Guidance(NAMES, 1.0, structures=["SpinalCord", "Parotid_L", "Parotid_R"])
    assert torch.equal(guidance(cold, guidance.protocols(image)), cold)


def test_coverage_is_pushed_up(image, dose):
    guidance = Guidance(NAMES, 1.0, structures=["PTV_Low"], sweeps=8)
    (before,) = judged(0.7 * dose, image, "PTV_Low")
    (after,) = judged(guidance(0.7 * dose, guidance.protocols(image)), image, "PTV_Low")
    assert before.margin < -2 and after.margin > -0.5


def test_own_limits_steer(image, dose, tmp_path):
    row = {"structure": "SpinalCord", "metric": "Max[Gy]", "direction": "<=", "limit": 30, "weight": 1.0, "site": "any",
           "source": "mine"}
    (tmp_path / "mine.json").write_text(json.dumps({"constraints": [row]}))
    guidance = Guidance(NAMES, 1.0, constraints=tmp_path / "mine.json", sweeps=10)
    (after,) = judged(guidance(dose, guidance.protocols(image)), image, "SpinalCord")
    assert after.value < 31


def test_bad_options_are_refused(image):
    with pytest.raises(CaseError, match="strength 2"):
        Guidance(NAMES, 2)
    with pytest.raises(CaseError, match="no row on"):
        Guidance(NAMES, 0.5, structures=["Nose"])
    with pytest.raises(CaseError, match="roi_size"):
        DoseDiffusionInferer(roi_size=[8, 8, 8], guidance=Guidance(NAMES, 0.5))


# ------------------------------------------------------------------------------------------------------ the sampling
@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    small = {"channels": [4, 8], "encoder_blocks": [1, 1], "decoder_blocks": [1]}
    options = {"detail_channels": ["prescription", "body"], "structure_widths": [4, 8], "token_dim": 8}
    net = ADDiffDose(NAMES, CONTEXT, prior=small, denoiser=small | {"attention_levels": [1]}, **options)
    return net.eval()


@pytest.mark.parametrize(("steps", "samples"), [(1, 1), (4, 2)])
def test_off_is_bit_identical(image, network, steps, samples):
    options = {"num_inference_steps": steps, "num_samples": samples, "flips": [[2]]}
    plain = DoseDiffusionInferer(**options)(image, network)
    off = DoseDiffusionInferer(**options, guidance=Guidance(NAMES, 0.0))(image, network)
    assert torch.equal(plain, off)
    on = DoseDiffusionInferer(**options, guidance=Guidance(NAMES, 1.0))(image, network)
    assert not torch.equal(plain, on) and torch.isfinite(on).all()


def hot_cord(network, image, dose):
    """The network with an estimate of x_0 that is always ``dose``."""

    class Fixed(torch.nn.Module):
        schedule, denoiser = network.schedule, network.denoiser
        encode, from_dose, to_dose = network.encode, network.from_dose, network.to_dose

        def denoise(self, x_t, t, conditions):
            return network.from_dose(dose, conditions)

    return Fixed()


@pytest.mark.parametrize("steps", [1, 4])
def test_sampling_is_steered(image, network, dose, steps):
    fixed = hot_cord(network, image, dose)
    results = []
    for strength in (0.0, 1.0):
        inferer = DoseDiffusionInferer(num_inference_steps=steps, guidance=Guidance(NAMES, strength, sweeps=8))
        results.append(judged(inferer(image, fixed), image))
    cord = [next(v for v in found if v.structure == "SpinalCord") for found in results]
    assert cord[0].value > 50 and cord[1].value < 46.5
    assert compliance(results[1]) > compliance(results[0])


def test_networks_without_a_denoiser_are_steered_too(image, dose):
    class Regression(torch.nn.Module):
        def forward(self, image):
            return dose

    inferer = DoseDiffusionInferer(guidance=Guidance(NAMES, 1.0, structures=["SpinalCord"], sweeps=8))
    assert judged(inferer(image, Regression()), image, "SpinalCord")[0].value < 45.7
