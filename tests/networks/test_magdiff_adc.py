"""MAGDiff-ADC: shapes, gradients, SPADE against a plain computation, adjacent slices, and one case that is learnt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from custom.case import CaseError
from custom.networks.magdiff_adc import MAGDiffADC, adjacent_slices
from custom.networks.magdiff_parts import AdaptiveDoseCalibration, SpatialNorm
from custom.objectives import DiffusionObjective

CHANNELS = ["ct", "prescription", "mask_Parotid_L", "body", "has_ct", "prescription_level"]
BODY, PAROTID = CHANNELS.index("body"), CHANNELS.index("mask_Parotid_L")
SMALL = {"channels": [8, 16], "blocks": 1, "embedding_dim": 16, "hidden_channels": 6, "guide_channels": 6}


def make_network(**changes) -> MAGDiffADC:
    torch.manual_seed(0)
    network = {**SMALL, **changes.pop("network", {})}
    return MAGDiffADC(CHANNELS, network=network, calibration={"channels": 8, "layers": 2}, **changes)


def make_image(size=(13, 16, 4), batch=1) -> torch.Tensor:
    image = torch.rand(batch, len(CHANNELS), *size, generator=torch.Generator().manual_seed(1))
    image[:, BODY] = 0
    image[:, BODY, 2:-2, 2:-2] = 1
    image[:, 1:3] = 0
    image[:, 1, 4:8, 4:8] = 1
    image[:, 2, 8:10, 3:6] = 1
    image[:, BODY + 1 :] = 1
    return image


def wake(network: nn.Module) -> nn.Module:
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return network


@pytest.mark.parametrize("changes", [{}, {"network": {"patch": 2}}, {"adjacent": 1}, {"calibrate": False}], ids=str)
@pytest.mark.parametrize("size", [(13, 16, 4), (5, 9, 1)])
def test_any_size_gives_a_dose_inside_the_body(changes, size):
    image = make_image(size, batch=2)
    with torch.no_grad():
        dose = wake(make_network(**changes)).eval()(image)
    assert dose.shape == (2, 1, *size) and dose.dtype == torch.float32
    assert torch.isfinite(dose).all() and float(dose.min()) >= 0
    assert float(dose[image[:, BODY, None] == 0].abs().sum()) == 0


def test_gradients_reach_every_parameter():
    network, image = wake(make_network()).train(), make_image((16, 20, 3))
    conditions = network.encode(image)
    x_t = torch.randn(1, 1, 16, 20, 3)
    output = network.denoise_output(x_t, torch.tensor([400]), conditions)
    ((output**2).sum() + (network.refine(x_t, conditions) ** 2).sum()).backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not float(p.grad.abs().sum()) > 0]
    assert silent == []


def test_adjacent_slices_are_stacked_and_repeated_at_the_ends():
    x = torch.arange(4.0).expand(1, 2, 3, 3, 4) + torch.tensor([0.0, 10.0]).reshape(1, 2, 1, 1, 1)
    stacked = adjacent_slices(x, 3)
    assert stacked.shape == (1, 6, 3, 3, 4)
    assert stacked[0, :, 0, 0].tolist() == [
        [0, 0, 1, 2], [10, 10, 11, 12], [0, 1, 2, 3], [10, 11, 12, 13], [1, 2, 3, 3], [11, 12, 13, 13]
    ]  # fmt: skip
    assert torch.equal(adjacent_slices(x, 1), x)
    with pytest.raises(CaseError, match="2 adjacent slices"):
        adjacent_slices(x, 2)


@pytest.mark.parametrize(("adjacent", "reached"), [(1, [2]), (3, [1, 2, 3]), (5, [0, 1, 2, 3, 4])])
def test_a_slices_anatomy_guides_its_neighbours_and_no_others(adjacent, reached):
    network, image = wake(make_network(adjacent=adjacent, calibrate=False)).eval(), make_image((12, 12, 5))
    assert network.halo == adjacent // 2
    other = image.clone()
    other[:, PAROTID, :, :, 2] = 1 - other[:, PAROTID, :, :, 2]
    x = torch.randn(1, 1, 12, 12, 5)
    with torch.no_grad():
        a, b = (network.denoise_output(x, torch.tensor([500]), network.encode(i)) for i in (image, other))
    changed = (a - b).abs().amax((0, 1, 2, 3)) > 1e-6
    assert changed.nonzero().flatten().tolist() == reached


def test_every_layer_is_guided():
    network = make_network()
    norms = [m for m in network.net.modules() if isinstance(m, nn.InstanceNorm2d)]
    assert len(norms) == sum(isinstance(m, SpatialNorm) for m in network.net.modules()) == 2 * 3 + 1


def test_spade_is_a_plain_computation():
    """``(x - mean) / std * (1 + gamma) + beta`` with two zero-padded correlations each, in numpy."""
    torch.manual_seed(2)
    norm = wake(SpatialNorm(2, 3, hidden_channels=4)).eval()
    x, anatomy = torch.randn(1, 3, 6, 5), torch.randn(1, 2, 6, 5)
    weights = {name: p.detach().double().numpy() for name, p in norm.named_parameters()}

    def conv(inputs, key):
        weight, bias = weights[f"{key}.conv.weight"], weights[f"{key}.conv.bias"]
        return np.stack([
            sum(ndimage.correlate(c, k, mode="constant") for c, k in zip(inputs, kernel)) + b
            for kernel, b in zip(weight, bias)
        ])  # fmt: skip

    hidden = conv(anatomy[0].double().numpy(), "mlp_shared")
    hidden = np.where(hidden > 0, hidden, 0.01 * hidden)
    features = x[0].double().numpy()
    mean = features.mean((1, 2), keepdims=True)
    normalised = (features - mean) / np.sqrt(features.var((1, 2), keepdims=True) + 1e-5)
    expected = normalised * (1 + conv(hidden, "mlp_gamma")) + conv(hidden, "mlp_beta")
    with torch.no_grad():
        np.testing.assert_allclose(norm(x, anatomy)[0].numpy(), expected, atol=1e-5)


def test_constant_map_still_speaks():
    """What MONAI's own block loses by normalising gamma and beta."""
    norm = wake(SpatialNorm(1, 3, hidden_channels=4)).eval()
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        low, high = norm(x, torch.zeros(1, 1, 8, 8)), norm(x, torch.ones(1, 1, 8, 8))
    assert float((low - high)[..., 3:5, 3:5].abs().min()) > 1e-4


def test_anatomy_is_averaged_to_every_level():
    network, image = make_network(), make_image((16, 16, 1))
    maps = network.encode(image).maps
    parotid = len(CHANNELS) - 1 + PAROTID  # the middle of three slices, prescription_level left out
    assert maps.own.shape == (1, 15, 16, 16) and torch.equal(maps.own[0, parotid], image[0, PAROTID, ..., 0])
    first, second = maps.pyramid
    torch.testing.assert_close(first, network.net.condense(maps.own))
    torch.testing.assert_close(second, first.reshape(1, 6, 8, 2, 8, 2).mean((3, 5)))


def test_calibration_starts_as_nothing_and_stays_within_the_regions():
    module, dose, anatomy = AdaptiveDoseCalibration(3), torch.rand(2, 1, 8, 8), torch.rand(2, 3, 8, 8)
    region = torch.zeros(2, 1, 8, 8)
    region[..., 2:5] = 1
    assert torch.equal(module(dose, anatomy, region), dose)
    wake(module)
    changed = module(dose, anatomy, region) != dose
    assert changed[..., 2:5].all() and not changed[..., 5:].any() and not changed[..., :2].any()
    assert sum(p.numel() for p in module.parameters()) < 30_000


def test_with_and_without_calibration_from_the_same_weights():
    image, network = make_image(), wake(make_network()).eval()
    plain = make_network(calibrate=False).eval()
    plain.load_state_dict(network.state_dict())
    in_roi = (image[:, 1:3] > 0).any(1, keepdim=True)
    with torch.no_grad():
        a, b = network(image), plain(image)
    assert torch.equal(a[~in_roi], b[~in_roi]) and not torch.allclose(a[in_roi], b[in_roi])


def test_one_case_is_overfitted():
    image = make_image((12, 12, 1))
    label = (0.9 * image[:, 1:2] + 0.3 * (1 - image[:, 1:2])) * image[:, BODY, None]
    network, inside = make_network(), image[:, BODY, None] > 0
    batch = {"image": image, "label": label, "body": inside}
    objective = DiffusionObjective(snr_limit=None, one_step_share=0.0)
    with torch.no_grad():
        before = float((network(image) - label).abs()[inside].mean())
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        objective(network, batch)["diffusion"].backward()
        optimizer.step()
    with torch.no_grad():
        after = float((network.eval()(image) - label).abs()[inside].mean())
    assert after < 0.5 * before


def test_traced_network_answers_alike():
    network, image = wake(make_network()).eval(), make_image()
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(network, image)(image), network(image))


def test_missing_regions_are_named():
    with pytest.raises(CaseError, match="no region_channels"):
        MAGDiffADC(["ct", "body", "prescription_level"], network=SMALL)
