"""Photon dose of a beam's fluence: divergent geometry, radiological depth, a few Gaussian kernels.

The dose at a voxel with beam's-eye-view position ``(u, w)`` at the isocentre plane, distance ``t`` from the source and
radiological depth ``d`` is

    D = (SAD / t)^2 * sum_k A_k(d) * (kappa_k * fluence)(u, w)

the singular-value decomposition of the pencil-beam kernel (Bortfeld, Schlegel, Rhein: Med Phys 20, 311, 1993), with
Gaussians for ``kappa_k``. The operator is matrix free: one sparse bilinear sampling matrix and two small dense spread
matrices a component, so that :meth:`Field.adjoint` is the exact transpose of :meth:`Field.forward`.

The beam data are generic for 6 MV, fitted to nominal depth doses; the low-density terms were set against Monte Carlo in
a lung slab. This is for planning priors and synthetic patients, not for dosimetry.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import ndimage, sparse
from scipy.special import erf

from custom.case import Grid

__all__ = ["Direction", "Field", "density_from_hu"]

SAD_MM = 1000.0
ATTENUATION_PER_MM = 0.00426
COMPONENTS = (  # weight, build-up 1/mm, Gaussian width mm, share of the surface dose
    (0.937, 0.32, 2.6, 0.515),
    (0.1704, 0.100, 16.4, 0.0),
    (0.3431, 0.00736, 49.5, 0.0),
)
LOW_DENSITY_WIDTH_MM = 4.5  # width of the primary component at densities of 0.25 and below
LOW_DENSITY_SCATTER_LOSS = 0.5  # share of the scatter components lost there
DENSITY_OF_HU = ((-1000, 0.001), (-100, 0.93), (0, 1.0), (100, 1.07), (1000, 1.56), (3000, 2.4))
SCATTER_MARGIN_MM = 90.0


def density_from_hu(ct_hu: np.ndarray) -> np.ndarray:
    """Density relative to water, float32, by a piecewise linear generic calibration."""
    hu, density = zip(*DENSITY_OF_HU, strict=True)
    return np.interp(ct_hu, hu, density).astype(np.float32)


def depth_terms(depth_mm: np.ndarray) -> np.ndarray:
    """Depth curves ``A_k`` of the three components for unit fluence; shape ``(3, *depth_mm.shape)``."""
    depth = np.maximum(depth_mm, 0.0)
    mu = ATTENUATION_PER_MM
    return np.stack([
        weight * beta / (beta - mu) * (np.exp(-mu * depth) - (1.0 - surface) * np.exp(-beta * depth))
        for weight, beta, _, surface in COMPONENTS
    ])


@dataclass(frozen=True)
class Field:
    """The linear map from one direction's beamlet fluence ``(u, w)`` to dose at a list of voxels.

    Args:
        sampling: ``(voxels, fine fluence pixels)`` bilinear weights.
        depth: ``(voxels, K)`` depth curves times divergence.
        spread_u, spread_w: K matrices ``(fine pixels, beamlets)``: square beamlets convolved with the kernels.
        active: ``(n_u, n_w)`` beamlets that may be open.
    """

    sampling: sparse.csr_matrix
    depth: np.ndarray
    spread_u: list[np.ndarray]
    spread_w: list[np.ndarray]
    active: np.ndarray

    @cached_property
    def _sampling_t(self) -> sparse.csr_matrix:
        return self.sampling.T.tocsr()

    def at(self, voxels: np.ndarray) -> Field:
        """The same map for some of the voxels (their positions in the list), in float64.

        An optimiser follows the last digits of its gradients: with float32 ones, 40 iterations of two releases of numpy
        are 0.2 Gy apart.
        """
        spread_u, spread_w = ([s.astype(np.float64) for s in spreads] for spreads in (self.spread_u, self.spread_w))
        sampling, depth = (a[voxels].astype(np.float64) for a in (self.sampling, self.depth))
        return Field(sampling, depth, spread_u, spread_w, self.active)

    def forward(self, fluence: np.ndarray) -> np.ndarray:
        """Dose at the voxels of a fluence ``(n_u, n_w)``."""
        fine = np.stack([(u @ fluence @ w.T).ravel() for u, w in zip(self.spread_u, self.spread_w, strict=True)], 1)
        return np.einsum("vk,vk->v", self.depth, self.sampling @ fine.astype(self.depth.dtype))

    def adjoint(self, residual: np.ndarray) -> np.ndarray:
        """Transpose of :meth:`forward`: from the voxels back to ``(n_u, n_w)``."""
        fine = np.ascontiguousarray((self._sampling_t @ (self.depth * residual[:, None])).T)
        fine = fine.reshape(-1, self.spread_u[0].shape[0], self.spread_w[0].shape[0])
        return sum(u.T @ plane @ w for u, plane, w in zip(self.spread_u, fine, self.spread_w, strict=True))


class Direction:
    """One gantry direction through one patient: beamlet lattice and radiological depth, made once.

    Args:
        density: relative density on ``grid``; zero outside the patient.
        grid: axis-aligned LPS grid.
        gantry_deg: IEC 61217 gantry angle, head-first supine: 0 from anterior, 90 from the patient's left.
        isocenter_mm: LPS position.
        target: boolean array on ``grid`` that the field must cover.
        beamlet_mm: beamlet size at the isocentre plane.
        margin_mm: beamlets open up to this far outside the target's projection.
    """

    def __init__(self, density, grid: Grid, gantry_deg: float, isocenter_mm, target, beamlet_mm=5.0, margin_mm=6.0,
                 depth_step_mm=4.0):
        angle = np.deg2rad(gantry_deg)
        self.gantry_deg, self.beamlet_mm = float(gantry_deg), float(beamlet_mm)
        self.isocenter_mm = np.asarray(isocenter_mm, dtype=np.float64)
        self._to_source = np.array([np.sin(angle), -np.cos(angle)])  # (x, y), towards the source
        self._u_axis = np.array([np.cos(angle), np.sin(angle)])  # IEC X of the beam
        self._axes = grid.axes_mm()
        self._spacing = grid.spacing_mm
        self._make_lattice(target, margin_mm)
        self._trace(density, depth_step_mm)

    def beam_eye_view(self, index) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``(u, w, t)`` in mm of voxel indices ``(i, j, k)``: at the isocentre plane, and from the source."""
        x, y, z = (self._axes[a][index[a]] - self.isocenter_mm[a] for a in range(3))
        t = SAD_MM - (x * self._to_source[0] + y * self._to_source[1])
        u = (x * self._u_axis[0] + y * self._u_axis[1]) * SAD_MM / t
        return u, z * SAD_MM / t, t

    def _make_lattice(self, target: np.ndarray, margin_mm: float) -> None:
        size = self.beamlet_mm
        u, w, _ = self.beam_eye_view(np.nonzero(target))
        reach = np.array([np.abs(u).max(), np.abs(w).max()]) + margin_mm
        n_u, n_w = np.ceil(reach / size + 1).astype(int)
        # rows are shifted by half a beamlet, as the leaf pairs of a symmetric collimator lie
        u_mm, w_mm = size * np.arange(-n_u, n_u + 1), size * (np.arange(-n_w, n_w + 1) + 0.5)
        active = np.zeros((u_mm.size, w_mm.size), dtype=bool)
        active[np.rint(u / size).astype(int) + n_u, np.rint(w / size - 0.5).astype(int) + n_w] = True
        active = ndimage.distance_transform_edt(~active, sampling=size) <= margin_mm + 0.1
        active |= ndimage.binary_closing(active)
        rows, cols = np.flatnonzero(active.any(1)), np.flatnonzero(active.any(0))
        box = slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1)
        self.active, self.u_mm, self.w_mm = active[box], u_mm[box[0]], w_mm[box[1]]

    def _trace(self, density: np.ndarray, step: float) -> None:
        """Radiological depth and local density on a divergent grid ``(t, u, w)``."""
        inside = np.nonzero(density > 0.05)
        u, w, t = self.beam_eye_view([a[:: max(1, inside[0].size // 20000)] for a in inside])
        limit_u = [max(u.min(), self.u_mm[0] - SCATTER_MARGIN_MM), min(u.max(), self.u_mm[-1] + SCATTER_MARGIN_MM)]
        limit_w = [max(w.min(), self.w_mm[0] - SCATTER_MARGIN_MM), min(w.max(), self.w_mm[-1] + SCATTER_MARGIN_MM)]
        self._starts = np.array([t.min() - 3 * step, limit_u[0] - 2 * step, limit_w[0] - 2 * step])
        stops = (t.max() + 3 * step, limit_u[1] + 2 * step, limit_w[1] + 2 * step)
        axes = [np.arange(a, b, step) for a, b in zip(self._starts, stops, strict=True)]
        t, u, w = axes
        local = self._resampled(density, t, u, w)
        oblique = np.sqrt(1.0 + (u[:, None] ** 2 + w[None, :] ** 2) / SAD_MM**2)
        self._step = step
        self._depth = (np.cumsum(local, axis=0) - 0.5 * local) * step * oblique
        self._local = ndimage.gaussian_filter(local, 8.0 / step)

    def _resampled(self, volume: np.ndarray, t: np.ndarray, u: np.ndarray, w: np.ndarray) -> np.ndarray:
        """``volume`` on the divergent grid, linearly, zero outside.

        Across the couch first, then along it, which takes a quarter of the time of ``map_coordinates`` at every point.
        """
        spread = t[:, None] / SAD_MM
        along, across = SAD_MM - t[:, None], u[None, :] * spread
        x, y = (self.isocenter_mm[a] + along * self._to_source[a] + across * self._u_axis[a] for a in (0, 1))
        z = self.isocenter_mm[2] + w[None, :] * spread
        i, j, k = ((p - axis[0]) / step for p, axis, step in zip((x, y, z), self._axes, self._spacing, strict=True))
        n_i, n_j, n_k = volume.shape
        inside = ((i >= 0) & (i <= n_i - 1) & (j >= 0) & (j <= n_j - 1)).ravel()
        planes = _bilinear(i.ravel()[inside], j.ravel()[inside], n_i, n_j, inside) @ volume.reshape(n_i * n_j, n_k)
        planes = planes.reshape(t.size, u.size, n_k)
        out = np.zeros((t.size, u.size, w.size), dtype=np.float32)
        for plane, row, here in zip(planes, k, out, strict=True):
            within = (row >= 0) & (row <= n_k - 1)
            first = np.minimum(row[within].astype(int), max(n_k - 2, 0))
            share = (row[within] - first).astype(np.float32)
            here[:, within] = plane[:, first] * (1 - share) + plane[:, np.minimum(first + 1, n_k - 1)] * share
        return out

    def radiological_depth(self, index) -> np.ndarray:
        """Water-equivalent depth in mm of voxel indices ``(i, j, k)``."""
        return self._look_up(self._depth, self.beam_eye_view(index))

    def _look_up(self, volume, bev) -> np.ndarray:
        u, w, t = bev
        point = [(c - s) / self._step for c, s in zip((t, u, w), self._starts, strict=True)]
        return ndimage.map_coordinates(volume, point, order=1, mode="nearest")

    def field(self, index) -> Field:
        """The dose operator for the voxels ``(i, j, k)`` (arrays of indices)."""
        bev = self.beam_eye_view(index)
        u, w, t = bev
        reach = SCATTER_MARGIN_MM
        near = (u > self.u_mm[0] - reach) & (u < self.u_mm[-1] + reach)
        near &= (w > self.w_mm[0] - reach) & (w < self.w_mm[-1] + reach)
        u, w, t = u[near], w[near], t[near]
        terms = depth_terms(self._look_up(self._depth, (u, w, t)))
        low = np.clip((0.75 - self._look_up(self._local, (u, w, t))) / 0.5, 0.0, 1.0)
        scatter = 1.0 - LOW_DENSITY_SCATTER_LOSS * low
        curves = [terms[0] * (1.0 - low), terms[0] * low, terms[1] * scatter, terms[2] * scatter]
        depth = np.zeros((near.size, len(curves)), dtype=np.float32)
        depth[near] = (np.stack(curves, 1) * ((SAD_MM / t) ** 2)[:, None]).astype(np.float32)
        pixel = min(self.beamlet_mm / 2, 4.0)
        fine_u = np.arange(self.u_mm[0] - reach, self.u_mm[-1] + reach + pixel, pixel)
        fine_w = np.arange(self.w_mm[0] - reach, self.w_mm[-1] + reach + pixel, pixel)
        sampling = _bilinear((u - fine_u[0]) / pixel, (w - fine_w[0]) / pixel, fine_u.size, fine_w.size, near)
        widths = (COMPONENTS[0][2], LOW_DENSITY_WIDTH_MM, COMPONENTS[1][2], COMPONENTS[2][2])
        spread_u = [_spread(fine_u, self.u_mm, self.beamlet_mm, s) for s in widths]
        spread_w = [_spread(fine_w, self.w_mm, self.beamlet_mm, s) for s in widths]
        return Field(sampling, depth, spread_u, spread_w, self.active)


def _bilinear(x, y, n_x: int, n_y: int, rows: np.ndarray) -> sparse.csr_matrix:
    """Sparse ``(rows.size, n_x * n_y)`` matrix sampling a plane at ``(x, y)`` for the rows that are True."""
    i, j = np.clip(x.astype(int), 0, n_x - 2), np.clip(y.astype(int), 0, n_y - 2)
    x, y = x - i, y - j
    base = i * n_y + j
    weight = np.stack([(1 - x) * (1 - y), (1 - x) * y, x * (1 - y), x * y], 1).ravel().astype(np.float32)
    column = np.stack([base, base + 1, base + n_y, base + n_y + 1], 1).ravel().astype(np.int32)
    start = np.concatenate([[0], np.cumsum(np.where(rows, 4, 0))]).astype(np.int32)
    return sparse.csr_matrix((weight, column, start), shape=(rows.size, n_x * n_y))


def _spread(fine_mm, centre_mm, size_mm: float, sigma_mm: float) -> np.ndarray:
    """Square beamlets convolved with a Gaussian, ``(fine pixels, beamlets)``: exact by error functions."""
    scaled = np.sqrt(2.0) * sigma_mm
    offset = fine_mm[:, None] - centre_mm[None, :]
    return (0.5 * (erf((offset + size_mm / 2) / scaled) - erf((offset - size_mm / 2) / scaled))).astype(np.float32)
