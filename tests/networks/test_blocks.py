"""Building blocks against their definitions."""

import pytest
import torch
from torch import nn

from custom.case import CaseError
from custom.networks.blocks import (
    Attention,
    NoiseSchedule,
    ResidualUNet3D,
    StableSiLU,
    make_norm,
    pad_to_multiple,
    pixel_shuffle_3d,
    position_encoding,
    time_encoding,
)


def test_stable_silu_is_silu_within_its_limit():
    x = torch.tensor([-3.0, 0.0, 3.0, 1e4])
    expected = torch.cat([nn.functional.silu(x[:3]), nn.functional.silu(torch.tensor([20.0]))])
    torch.testing.assert_close(StableSiLU()(x), expected)


def test_pixel_shuffle_undoes_space_to_depth():
    fine = torch.rand(2, 3, 4, 6, 8)
    blocks = fine.reshape(2, 3, 2, 2, 3, 2, 4, 2).permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(2, 24, 2, 3, 4)
    torch.testing.assert_close(pixel_shuffle_3d(blocks), fine)


def test_padding_appends_zeros_at_the_far_end():
    x = torch.ones(1, 1, 3, 4, 5)
    padded = pad_to_multiple(x, 4)
    assert padded.shape == (1, 1, 4, 4, 8)
    torch.testing.assert_close(padded[:, :, :3, :4, :5], x)
    assert float(padded.sum()) == 60
    assert pad_to_multiple(padded, 4) is padded
    assert pad_to_multiple(x[..., :2], 4).shape == (1, 1, 8, 4, 4)


def test_encodings_tell_places_apart():
    assert time_encoding(torch.tensor([0, 999]), 16).shape == (2, 16)
    codes = position_encoding((2, 3, 4), 20, torch.device("cpu"))[0]
    assert codes.shape == (24, 20)
    assert len({tuple(row.tolist()) for row in codes.round(decimals=4)}) == 24


def test_attention_of_equal_tokens_is_their_value():
    attention = Attention(8, 2, context_dim=6)
    context = torch.rand(1, 1, 6).expand(1, 5, 6)
    value = attention.key_value(context[:, :1]).chunk(2, -1)[1]
    torch.testing.assert_close(attention(torch.rand(1, 3, 8), context), attention.out(value).expand(1, 3, 8))


@pytest.mark.parametrize("kind", ["instance", "group", "none"])
def test_unet_keeps_size(kind):
    unet = ResidualUNet3D(3, 2, (4, 8), (1, 1), (1,), norm=kind)
    assert unet(torch.rand(2, 3, 8, 12, 4)).shape == (2, 2, 8, 12, 4)


def test_wrong_counts_and_names_are_refused():
    with pytest.raises(CaseError, match="encoder_blocks"):
        ResidualUNet3D(3, 2, (4, 8), (1,), (1,))
    with pytest.raises(CaseError, match="'batch'"):
        make_norm("batch", 4)
    with pytest.raises(CaseError, match="heads"):
        Attention(8, 3)
    with pytest.raises(CaseError, match="parameterization"):
        NoiseSchedule(parameterization="x")


@pytest.mark.parametrize("kind", ["epsilon", "v", "sample"])
def test_schedule_recovers_x0_from_the_exact_output(kind):
    schedule = NoiseSchedule(parameterization=kind)
    x0, noise, t = torch.randn(2, 1, 3, 3, 3), torch.randn(2, 1, 3, 3, 3), torch.tensor([10, 600])
    x_t = schedule.add_noise(x0, noise, t)
    torch.testing.assert_close(schedule.to_x0(schedule.target(x0, noise, t), x_t, t), x0, rtol=1e-3, atol=1e-3)


def test_estimate_is_clipped():
    schedule = NoiseSchedule(parameterization="epsilon", clip_x0=1.5)
    x0 = schedule.to_x0(torch.ones(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1), torch.tensor([999]))
    assert float(x0) == -1.5


def test_schedule_is_the_papers():
    alpha_bar = NoiseSchedule().alpha_bar
    assert len(alpha_bar) == 1000
    assert float(alpha_bar[0]) == pytest.approx(1 - 1e-4)
    assert float(alpha_bar[1]) == pytest.approx((1 - 1e-4) * (1 - 1e-4 - 0.0199 / 999), rel=1e-6)
    assert float(alpha_bar[-1]) == pytest.approx(4.04e-5, rel=1e-2)
