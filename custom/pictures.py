"""Pictures of a training for TensorBoard: the dose predicted for a validation case beside its reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib import colormaps
from torch import Tensor

__all__ = ["dose_pictures"]

HIGHEST = 1.1  # of the prescription: the end of the colour scale
LARGEST_ERROR = 0.2  # of the prescription: the ends of the scale of differences


def dose_pictures(output: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Prediction, reference and their difference (red: too much) in the axial plane with the most reference dose.

    For ``TensorBoardImageHandler(output_transform=...)`` of the validator.

    Args:
        output: items with ``pred`` (1, X, Y, Z) and ``label`` (1 or more, X, Y, Z), fractions of the prescription.

    Returns:
        Colours (N, 3, Y, 3 X) in 0 to 1, patient's right on the left; as many rows as the largest item has.
    """
    pictures = [_picture(item["pred"][0].float().cpu(), item["label"][0].float().cpu()) for item in output]
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (1, 2))
    out = torch.zeros(len(pictures), 3, height, width)
    for row, picture in zip(out, pictures):
        row[:, : picture.shape[1], : picture.shape[2]] = picture
    return out


def _picture(pred: Tensor, label: Tensor) -> Tensor:
    """Colours (3, Y, 3 X) of two doses (X, Y, Z)."""
    plane = int(label.sum((0, 1)).argmax())
    pred, label = pred[..., plane].T, label[..., plane].T
    error = (pred - label) / LARGEST_ERROR / 2 + 0.5
    panels = [_coloured(pred / HIGHEST, "turbo"), _coloured(label / HIGHEST, "turbo"), _coloured(error, "coolwarm")]
    return torch.cat(panels, dim=2)


def _coloured(values: Tensor, scale: str) -> Tensor:
    """Colours (3, Y, X) of values from 0 to 1."""
    colours = colormaps[scale](values.clamp(0, 1).numpy())[..., :3]
    return torch.from_numpy(colours).permute(2, 0, 1).float()
