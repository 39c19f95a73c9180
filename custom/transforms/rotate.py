"""Random crops, some of them turned about the patient's long axis and taken with other voxel edges."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from monai.transforms.utils import weighted_patch_samples
from monai.utils import fall_back_tuple
from torch import Tensor
from torch.nn import functional as F

from custom.case import Keys
from custom.networks.beams import PREFIX
from custom.transforms.condition import CONTEXT, SECTOR_DEG

__all__ = ["RandTurnedCropd", "turned_crop"]

EDGE_OF = {"spacing_x": 0, "spacing_y": 0, "spacing_z": 1}  # entries of the context: which of a patch's edges they tell


class RandTurnedCropd(RandomizableTransform, MapTransform):
    """Crop patches around random voxels, turned about the third axis by a random multiple of ``angle_deg``.

    Nine beams at every 40 degrees are the same beams after a turn by 40 degrees, so the turned patient with the turned
    dose is a plan as good as the other (the augmentation of OpenKBP's winner: Liu et al., Med Phys 48, 2021). Wants
    equal voxel edges along the first two axes. Patches that are not turned are plain crops, untouched by interpolation.

    A turned patch may also be turned a little further, beams and all, and have other voxel edges: the same patient on
    another grid, whose distances in millimetres, dose and prescription stay what they are.

    Args:
        keys: tensors ``(C, X, Y, Z)`` of one size.
        nearest: those of them that hold labels: taken from the nearest voxel; the others are interpolated linearly.
        w_key: tensor ``(1, X, Y, Z)`` with the probability of a voxel to be the centre, up to a factor, among those
            around which a patch lies within the volume; along an axis shorter than the patch, the volume's middle.
        spatial_size: of the patch; outside of the volume it is zero. -1 takes the whole extent of that axis.
        angle_deg: angle between neighbouring beams; a divisor of 360.
        prob: share of the patches that are turned.
        num_samples: patches a volume.
        jitter_deg: turned patches are turned by up to this much more or less, uniformly; some of them by this alone.
        edge_change: voxel edges of turned patches, in the plane and along the third axis, are those of the volume times
            a factor drawn uniformly between ``1 - edge_change`` and ``1 + edge_change``.
        context_channels: names of the entries of ``context``, whose ``spacing_`` entries follow the edges, as does
            ``voxel_cc`` where there is one.
        spatial_channels: names of the channels of ``image``, whose ``plan_beam_`` channels follow the beams.

    Returns:
        A list of ``num_samples`` dictionaries, as MONAI's crops give.
    """

    def __init__(self, keys: KeysCollection, nearest: Sequence[str] = (), w_key: str = "body",
                 spatial_size: Sequence[int] = (64, 64, 48), angle_deg: float = 40.0, prob: float = 0.3,
                 num_samples: int = 1, jitter_deg: float = 0.0, edge_change: float = 0.0,
                 context_channels: Sequence[str] = (), spatial_channels: Sequence[str] = ()) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.nearest, self.w_key, self.size, self.angle_deg = set(nearest), w_key, tuple(spatial_size), angle_deg
        self.num_samples, self.jitter_deg, self.edge_change = num_samples, jitter_deg, edge_change
        self.context, self.spatial = tuple(context_channels), tuple(spatial_channels)

    def __call__(self, data: Mapping[Hashable, Tensor]) -> list[dict[Hashable, Tensor]]:
        weights = torch.as_tensor(data[self.w_key])[0]
        return [self._patch(data, centre) for centre in
                weighted_patch_samples(self.size, weights, n_samples=self.num_samples, r_state=self.R)]

    def _patch(self, data: Mapping[Hashable, Tensor], centre: Sequence[int]) -> dict[Hashable, Tensor]:
        out = dict(data)
        self.randomize(None)
        size = fall_back_tuple(self.size, data[self.w_key].shape[1:])
        centre = [int(c) for c in centre]
        angle, edges = self._turn() if self._do_transform else (0.0, (1.0, 1.0))
        for key in self.key_iterator(out):
            out[key] = turned_crop(torch.as_tensor(out[key]), centre, size, angle, key in self.nearest, edges)
        if angle and self.spatial:
            out[Keys.IMAGE] = out[Keys.IMAGE][turned_beams(self.spatial, angle)]
        if edges != (1.0, 1.0) and self.context:
            factors = [edges[EDGE_OF[name]] if name in EDGE_OF else 1.0 for name in self.context]
            out[CONTEXT] = out[CONTEXT] * torch.tensor(factors)
        if "voxel_cc" in out:
            out["voxel_cc"] = out["voxel_cc"] * edges[0] ** 2 * edges[1]
        return out

    def _turn(self) -> tuple[float, tuple[float, float]]:
        """Angle, and voxel edges in the plane and along the third axis as multiples of the volume's."""
        around = round(360.0 / self.angle_deg)
        turns = self.R.randint(0 if self.jitter_deg else 1, around)
        angle = turns * self.angle_deg + (self.R.uniform(-self.jitter_deg, self.jitter_deg) if self.jitter_deg else 0.0)
        if not self.edge_change:
            return angle, (1.0, 1.0)
        low, high = 1 - self.edge_change, 1 + self.edge_change
        return angle, (self.R.uniform(low, high), self.R.uniform(low, high))


def turned_beams(names: Sequence[str], angle_deg: float) -> list[int]:
    """For each spatial channel, which of the volume's is in its place in the patch of :func:`turned_crop`.

    A beam from gantry angle g comes from ``g - angle_deg`` in the patch; each sector's dose is the nearest one's.
    """
    turns = round(angle_deg / SECTOR_DEG)
    beams = {f"{PREFIX}{angle}": angle for angle in range(0, 360, SECTOR_DEG)}
    source = [f"{PREFIX}{(beams[n] + turns * SECTOR_DEG) % 360}" if n in beams else n for n in names]
    return [list(names).index(s) if s in names else i for i, s in enumerate(source)]


def turned_crop(volume: Tensor, centre: Sequence[int], size: Sequence[int], angle_deg: float, nearest: bool,
                edges: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Patch ``(C, *size)`` of ``(C, X, Y, Z)`` around a voxel, turned about the third axis through it.

    Args:
        volume: any dtype, which the patch has too; zero is what lies outside.
        centre: voxel that lands at ``size // 2``.
        size: of the patch.
        angle_deg: the patch's first axis points to this angle from the volume's first towards its second axis.
        nearest: nearest voxel instead of linear interpolation.
        edges: edge of the patch's voxels in the plane and along the third axis, in voxels of the volume.
    """
    if angle_deg % 360 == 0 and edges == (1.0, 1.0):
        return _box(volume, [c - n // 2 for c, n in zip(centre, size, strict=True)], size)
    in_plane, along = edges
    reach = int((size[0] ** 2 + size[1] ** 2) ** 0.5 / 2 * in_plane) + 2  # circle around the turned rectangle
    edge = 2 * reach + 1
    k = (torch.arange(size[2], dtype=torch.float32) - size[2] // 2) * along
    low, depth = int(k[0].floor()), int(k[-1].ceil()) - int(k[0].floor()) + 1
    disc = _box(volume, [centre[0] - reach, centre[1] - reach, centre[2] + low], (edge, edge, depth))
    angle = torch.deg2rad(torch.tensor(float(angle_deg)))
    i, j = ((torch.arange(n, dtype=torch.float32) - n // 2) * in_plane for n in size[:2])
    x = torch.cos(angle) * i[:, None] - torch.sin(angle) * j[None]
    y = torch.sin(angle) * i[:, None] + torch.cos(angle) * j[None]
    grid = torch.stack([y, x], dim=-1)[None] / reach  # grid_sample's order; -1 and 1 are the outermost voxels' centres
    planes = disc.float().permute(0, 3, 1, 2).reshape(1, -1, edge, edge)
    mode = "nearest" if nearest else "bilinear"
    turned = F.grid_sample(planes, grid, mode=mode, padding_mode="zeros", align_corners=True)
    turned = turned.reshape(volume.shape[0], depth, size[0], size[1])
    if along != 1.0:
        turned = _planes_at(turned, k - low, nearest)
    return turned.permute(0, 2, 3, 1).to(volume.dtype).contiguous()


def _planes_at(planes: Tensor, position: Tensor, nearest: bool) -> Tensor:
    """Planes ``(C, N, X, Y)`` of ``(C, K, X, Y)`` at fractional positions ``(N,)`` along the second axis."""
    if nearest:
        return planes[:, (position + 0.5).floor().long()]
    below = position.floor().long()
    above = (below + 1).clamp_max(planes.shape[1] - 1)
    return torch.lerp(planes[:, below], planes[:, above], (position - below).reshape(-1, 1, 1))


def _box(volume: Tensor, start: Sequence[int], size: Sequence[int]) -> Tensor:
    """Box of ``size`` from ``start``, which may lie partly outside, where it is zero."""
    out = volume.new_zeros((volume.shape[0], *size))
    inside = [(max(s, 0), min(s + n, full)) for s, n, full in zip(start, size, volume.shape[1:], strict=True)]
    if all(a < b for a, b in inside):
        source = tuple(slice(a, b) for a, b in inside)
        target = tuple(slice(a - s, b - s) for (a, b), s in zip(inside, start, strict=True))
        out[(slice(None), *target)] = volume[(slice(None), *source)]
    return out
