"""DoseDiff: shapes, gradients, the fusionFormer and AdaGN against plain computations, and one slice that is learnt."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from custom.case import CaseError
from custom.networks.axial import AxialResidualBlock, fold_slices, scale_ct, unfold_slices
from custom.networks.blocks import position_encoding
from custom.networks.dosediff import DoseDiff
from custom.networks.dosediff_parts import FusionFormer
from custom.objectives import DiffusionObjective

CHANNELS = ["ct", "psdm_target_high", "psdm_Parotid_L", "body", "has_ct", "has_Parotid_L", "prescription_level"]
BODY = CHANNELS.index("body")
SMALL = {"channels": [8, 16, 16], "blocks": 1, "embedding_dim": 16, "fusion_dim": 12}
SWITCHES = [
    {},
    {"multi_scale": False},
    {"fusion_former": False},
    {"multi_scale": False, "fusion_former": False},
    {"timed_conditions": False, "patch": 2},
    {"adaptive_norm": False},
]


def make_network(schedule=None, **network) -> DoseDiff:
    torch.manual_seed(0)
    return DoseDiff(CHANNELS, network={**SMALL, **network}, schedule=schedule)


def make_image(size=(17, 20, 3), batch=1, level=1.0) -> torch.Tensor:
    image = torch.rand(batch, len(CHANNELS), *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    image[:, BODY] = 0
    image[:, BODY, 2:-2, 2:-2] = 1
    image[:, BODY + 1 :] = torch.tensor([1.0, 1.0, level]).reshape(1, -1, 1, 1, 1)
    return image


def wake(network: nn.Module) -> nn.Module:
    """Move the zero-initialised layers off zero."""
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return network


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("size", [(17, 20, 3), (5, 9, 1)])
def test_any_size_and_ablation_gives_a_dose_inside_the_body(switches, size):
    image = make_image(size, batch=2)
    with torch.no_grad():
        dose = wake(make_network(**switches)).eval()(image)
    assert dose.shape == (2, 1, *size) and dose.dtype == torch.float32
    assert torch.isfinite(dose).all() and float(dose.min()) >= 0 and float(dose.max()) <= 8 / 7 + 1e-6
    assert float(dose[image[:, BODY, None] == 0].abs().sum()) == 0


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_gradients_reach_every_parameter(switches):
    network, image = wake(make_network(**switches)).train(), make_image((20, 24, 2))
    conditions = network.encode(image)
    output = network.denoise_output(torch.randn(1, 1, 20, 24, 2), torch.tensor([400]), conditions)
    (output**2).sum().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not float(p.grad.abs().sum()) > 0]
    assert silent == []


def test_slices_are_independent_and_folding_is_inverted():
    x = torch.rand(2, 3, 4, 5, 6)
    torch.testing.assert_close(unfold_slices(fold_slices(x), 2), x)
    torch.testing.assert_close(fold_slices(x)[6 + 4], x[1, ..., 4])
    network, image = wake(make_network()).eval(), make_image()
    with torch.no_grad():
        torch.testing.assert_close(network(image)[..., 1:2], network(image[..., 1:2]), atol=1e-5, rtol=1e-4)


def test_time_and_conditions_matter():
    network, image = wake(make_network()).eval(), make_image()
    x = torch.randn(1, 1, 17, 20, 3)
    with torch.no_grad():
        first = network.denoise_output(x, torch.tensor([900]), network.encode(image))
        assert not torch.allclose(first, network.denoise_output(x, torch.tensor([100]), network.encode(image)))
        for channel in ("ct", "psdm_target_high", "has_Parotid_L"):
            other = image.clone()
            other[:, CHANNELS.index(channel)] -= 0.5
            assert not torch.allclose(first, network.denoise_output(x, torch.tensor([900]), network.encode(other)))


def test_dose_range_is_80_gy():
    network = make_network()
    conditions = network.encode(make_image(level=0.9))  # a prescription of 63 Gy
    dose_gy = torch.tensor([0.0, 40.0, 63.0, 80.0])
    x0 = network.from_dose(dose_gy / 63.0, conditions).flatten()
    torch.testing.assert_close(x0, dose_gy / 40 - 1)
    full = torch.full((1, 1, 17, 20, 3), 0.25)
    torch.testing.assert_close(network.from_dose(network.to_dose(full, conditions), conditions)[0, 0, 5, 5, 1],
                               torch.tensor(0.25))


def test_ct_range_is_the_papers():
    torch.testing.assert_close(scale_ct(torch.tensor([-1.2, -1.0, 0.25, 1.5, 2.0])), torch.tensor([-1.0, -1, 0, 1, 1]))


def test_fusion_former_is_equations_12_and_13():
    """Against plain numpy: tokens of 2 x 2 voxels, softmax(beta(q) gamma(k)^T / sqrt(d)) delta(v) + delta(v), MLP."""
    torch.manual_seed(3)
    fusion = wake(FusionFormer(channels=3, dim=6, patch=2)).eval()
    maps = [torch.randn(1, 3, 4, 6) for _ in range(3)]
    weights = {name: p.detach().double().numpy() for name, p in fusion.named_parameters()}

    def norm(x, key):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * weights[f"{key}.weight"] + weights[f"{key}.bias"]

    def tokens(x, n):
        x = x[0].double().numpy()
        pieces = [x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].ravel() for i in range(2) for j in range(3)]
        linear = np.stack(pieces) @ weights[f"embed.{n}.0.weight"].T + weights[f"embed.{n}.0.bias"]
        return norm(linear, f"embed.{n}.1") + position_encoding([2, 3, 1], 6, "cpu")[0].double().numpy()

    query, key, value = (tokens(x, n) for n, x in enumerate(maps))
    value = value @ weights["delta.weight"].T
    scores = (query @ weights["beta.weight"].T) @ (key @ weights["gamma.weight"].T).T / math.sqrt(6)
    attention = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    attended = attention @ value + value
    hidden = norm(attended, "mlp.0") @ weights["mlp.1.weight"].T + weights["mlp.1.bias"]
    gelu = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    out = gelu @ weights["mlp.3.weight"].T + weights["mlp.3.bias"] + attended
    pieces = out @ weights["out.weight"].T + weights["out.bias"]
    expected = np.zeros((3, 4, 6))
    for n, piece in enumerate(pieces):
        i, j = divmod(n, 3)
        expected[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = piece.reshape(3, 2, 2)
    with torch.no_grad():
        np.testing.assert_allclose(fusion(*maps)[0].numpy(), expected, atol=1e-5)


def test_adagn_is_equation_11():
    torch.manual_seed(0)
    block = wake(AxialResidualBlock(4, 8, embedding_dim=5))
    x, embedding = torch.randn(2, 4, 6, 6), torch.randn(2, 5)
    h = block.conv1(F.silu(F.group_norm(x, 1, block.norm1.weight, block.norm1.bias)))
    projected = embedding @ block.embed.weight.T + block.embed.bias
    mean, variance = h.mean((1, 2, 3), keepdim=True), h.var((1, 2, 3), keepdim=True, unbiased=False)
    h = (1 + projected[:, :8, None, None]) * (h - mean) / (variance + 1e-5).sqrt() + projected[:, 8:, None, None]
    torch.testing.assert_close(block(x, embedding), block.skip(x) + block.conv2(F.silu(h)), atol=1e-5, rtol=1e-4)


def test_conditions_encoded_once_answer_alike_at_every_time():
    network = wake(make_network(timed_conditions=False)).eval()
    assert [n for n, _ in network.net.ct_encoder.named_parameters() if "embed" in n] == []
    conditions = network.encode(make_image())
    assert len(conditions.maps[0]) == 3  # features, a tensor a level


def test_one_slice_is_overfitted():
    image = make_image((16, 16, 1))
    image[0, 1] = torch.linspace(-1, 1, 16).reshape(16, 1, 1)
    label = (0.5 + 0.4 * image[:, 1:2].sign()) * image[:, BODY, None]
    network = make_network(patch=2, timed_conditions=False)
    batch = {"image": image, "label": label, "body": image[:, BODY, None]}
    objective = DiffusionObjective(snr_limit=None, one_step_share=0.0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        objective(network, batch)["diffusion"].backward()
        optimizer.step()
    network.eval()
    inside = image[:, BODY, None] > 0
    with torch.no_grad():
        error = (network(image) - label).abs()[inside].mean()
        untrained = (make_network().eval()(image) - label).abs()[inside].mean()
    assert float(error) < 0.08 < 0.25 < float(untrained)


def test_traced_network_answers_alike():
    network, image = wake(make_network()).eval(), make_image()
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(network, image)(image), network(image))


def test_wrong_wiring_is_named():
    with pytest.raises(CaseError, match="prescription_level"):
        DoseDiff(["ct", "body", "psdm_SpinalCord"], network=SMALL)
    with pytest.raises(CaseError, match="beam_high"):
        DoseDiff(CHANNELS, ct_channels=["ct", "beam_high"], network=SMALL)
    with pytest.raises(CaseError, match=r"expected \(B, 7, X, Y, Z\)"):
        make_network()(torch.zeros(1, 3, 8, 8, 2))
    with pytest.raises(CaseError, match="two levels"):
        make_network(channels=[8])
