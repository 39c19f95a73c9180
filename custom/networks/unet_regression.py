"""A plain 3D U-Net that predicts the dose in one pass: the baseline of the comparison."""

from __future__ import annotations

from collections.abc import Sequence

from monai.networks.nets import UNet
from torch import Tensor, nn

from custom.networks.axial import channel_indices
from custom.networks.blocks import pad_to_multiple

__all__ = ["UNetRegression"]


class UNetRegression(nn.Module):
    """MONAI's U-Net on the condition channels: ``image`` (B, C, X, Y, Z) in, dose (B, 1, X, Y, Z) out; any size works.

    The dose is a fraction of the highest prescription, zero outside the body; negative values are cut in eval mode.

    Args:
        condition_channels: name of every channel of ``image``; must hold ``body``.
        channels: channels of each level.
        num_res_units: residual units a level.
        norm: normalisation, by MONAI's name.
    """

    def __init__(
        self,
        condition_channels: Sequence[str],
        channels: Sequence[int] = (16, 32, 64, 128, 256),
        num_res_units: int = 2,
        norm: str = "instance",
    ) -> None:
        super().__init__()
        (self.body_channel,) = channel_indices(condition_channels, ["body"], "channel")
        self.multiple = 2 ** (len(channels) - 1)
        self.net = UNet(
            spatial_dims=3, in_channels=len(condition_channels), out_channels=1, channels=list(channels),
            strides=[2] * (len(channels) - 1), num_res_units=num_res_units, norm=norm,
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        image = image.as_tensor() if hasattr(image, "as_tensor") else image
        i, j, k = image.shape[2:]
        dose = self.net(pad_to_multiple(image, self.multiple))[:, :, :i, :j, :k].float()
        dose = dose * (image[:, self.body_channel, None] > 0.5)
        return dose if self.training else dose.clamp_min(0)
