"""Leaf positions of a 60-pair collimator: sliding windows that deliver a fluence, apertures that fit the targets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from custom.case import Beam, Case

__all__ = ["LEAF_BOUNDARIES_MM", "SAD_MM", "Delivery", "conform", "deliver_arc", "deliver_field", "sliding_window"]

SAD_MM = 1000.0
LEAF_BOUNDARIES_MM = np.concatenate((np.arange(-200, -100, 10.0), np.arange(-100, 100, 5.0), np.arange(100, 201, 10.0)))
MU_PER_GY = 100.0
MU_PER_MM = 0.2  # meterset while the faster leaf moves one millimetre
FIELD_CONTROL_POINTS = 40
SECTOR_CONTROL_POINTS = 13
SECTOR_SHARE = 0.95  # of an arc's sector; the leaves regroup in the rest
FLUENCE_FLOOR = 0.02  # leaf pairs below this share of the direction's maximum stay closed
APERTURE_MARGIN_MM = 5.0


@dataclass(frozen=True)
class Delivery:
    """Control points of one beam.

    Args:
        gantry_deg: ``(n,)``, rising through 360 in an arc.
        meterset: ``(n,)`` cumulative monitor units of one fraction.
        x1_mm, x2_mm: ``(n, pairs)`` leaf ends of the negative and the positive bank at the isocentre plane (IEC X).
    """

    gantry_deg: np.ndarray
    meterset: np.ndarray
    x1_mm: np.ndarray
    x2_mm: np.ndarray

    def jaws_mm(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The rectangle ``(X1, X2), (Y1, Y2)`` around every opening of the beam."""
        open_rows = np.flatnonzero((self.x2_mm > self.x1_mm).any(axis=0))
        if open_rows.size == 0:
            return (0.0, 0.0), (0.0, 0.0)
        y = LEAF_BOUNDARIES_MM[open_rows[0]], LEAF_BOUNDARIES_MM[open_rows[-1] + 1]
        x = self.x1_mm[:, open_rows].min(), self.x2_mm[:, open_rows].max()
        return (float(x[0]), float(x[1])), (float(y[0]), float(y[1]))


def deliver_field(
    fluence: np.ndarray, u_mm: np.ndarray, w_mm: np.ndarray, gantry_deg: float, fractions: int
) -> Delivery:
    """A fixed field as one sliding window; ``fluence`` is ``(n_u, n_w)`` for the whole course, in Gy of open field."""
    wanted = _on_leaf_pairs(fluence, w_mm) * MU_PER_GY / fractions
    total, x1, x2 = sliding_window(wanted, u_mm, FIELD_CONTROL_POINTS)
    return Delivery(np.full(len(x1), gantry_deg), np.linspace(0.0, total, len(x1)), x1, x2)


def deliver_arc(fluences: list, u_mm: list, w_mm: list, gantry_deg: list, fractions: int) -> Delivery:
    """An arc whose directions are each swept within their own gantry sector, in alternating sense."""
    angle = np.rad2deg(np.unwrap(np.deg2rad(np.asarray(gantry_deg, dtype=np.float64))))
    half = SECTOR_SHARE * float(np.median(np.diff(angle))) / 2
    parts, done = [], 0.0
    for q, (fluence, u, w) in enumerate(zip(fluences, u_mm, w_mm)):
        wanted = _on_leaf_pairs(fluence, w) * MU_PER_GY / fractions
        total, x1, x2 = sliding_window(wanted, u, SECTOR_CONTROL_POINTS, backwards=q % 2 == 1)
        share = np.linspace(0.0, 1.0, SECTOR_CONTROL_POINTS)
        parts.append((angle[q] - half + 2 * half * share, done + total * share, x1, x2))
        done += total
    return Delivery(*(np.concatenate(arrays) for arrays in zip(*parts)))


def conform(case: Case, beam: Beam, dose_gy: float) -> Delivery:
    """Leaves around the targets seen from each of the beam's angles, ``dose_gy`` spread evenly over them.

    A fixed field has two equal control points, an arc one an angle.
    """
    gantry = np.asarray(beam.gantry_deg, dtype=np.float64)
    gantry = np.rad2deg(np.unwrap(np.deg2rad(gantry))) if beam.is_arc else np.repeat(gantry, 2)
    centres = case.grid.to_world(np.argwhere(case.target_mask())) - np.asarray(beam.isocenter_mm)
    margin = APERTURE_MARGIN_MM + float(case.grid.spacing_mm.max()) / 2
    shapes = [_aperture(centres, angle, margin) for angle in gantry]
    meterset = np.linspace(0.0, MU_PER_GY * dose_gy, gantry.size)
    return Delivery(gantry, meterset, np.stack([s[0] for s in shapes]), np.stack([s[1] for s in shapes]))


def _aperture(points_mm: np.ndarray, gantry_deg: float, margin_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Leaf ends around points given relative to the isocentre, in the beam's-eye view (IEC 61217)."""
    sin, cos = np.sin(np.deg2rad(gantry_deg)), np.cos(np.deg2rad(gantry_deg))
    x, y, z = points_mm.T
    magnify = SAD_MM / (SAD_MM - (x * sin - y * cos))
    u, w = (x * cos + y * sin) * magnify, z * magnify
    x1 = np.zeros(LEAF_BOUNDARIES_MM.size - 1)
    x2 = np.zeros_like(x1)
    for p, (low, high) in enumerate(zip(LEAF_BOUNDARIES_MM[:-1], LEAF_BOUNDARIES_MM[1:])):
        seen = u[(w > low - margin_mm) & (w < high + margin_mm)]
        if seen.size:
            x1[p], x2[p] = np.clip((seen.min() - margin_mm, seen.max() + margin_mm), -200, 200).round(1)
    return x1, x2


def _on_leaf_pairs(fluence: np.ndarray, w_mm: np.ndarray) -> np.ndarray:
    """``(n_u, n_w)`` beamlets to ``(n_u, pairs)``: mean over each leaf's width; leaves less than half covered close."""
    size = w_mm[1] - w_mm[0] if len(w_mm) > 1 else 5.0
    low, high = LEAF_BOUNDARIES_MM[:-1, None], LEAF_BOUNDARIES_MM[1:, None]
    overlap = np.clip(np.minimum(high, w_mm + size / 2) - np.maximum(low, w_mm - size / 2), 0, None)
    covered = overlap.sum(axis=1, keepdims=True)
    weight = np.where(covered >= (high - low) / 2, overlap / np.maximum(covered, 1e-9), 0.0)
    return fluence.astype(np.float64) @ weight.T


def sliding_window(
    wanted_mu: np.ndarray, u_mm: np.ndarray, control_points: int, backwards: bool = False
) -> tuple[float, np.ndarray, np.ndarray]:
    """Leaf positions of a one-way sweep that opens each point for the wanted time.

    The leading leaf passes a point ``wanted_mu`` before the trailing one does, and at every point the faster of the two
    moves at full speed, which is optimal for a single pair (Spirou, Chui: Med Phys 21, 1031, 1994).

    Args:
        wanted_mu: ``(n_u, pairs)`` monitor units, not negative.
        u_mm: ``(n_u,)`` equispaced beamlet centres.
        control_points: equidistant in meterset.
        backwards: sweep towards negative ``u``.

    Returns:
        total monitor units, and the ``(control_points, pairs)`` leaf ends of the negative and positive bank, to 0.1 mm.
    """
    if backwards:
        total, x1, x2 = sliding_window(wanted_mu[::-1], -u_mm[::-1], control_points)
        return total, -x2, -x1
    half = (u_mm[1] - u_mm[0]) / 2 if len(u_mm) > 1 else 2.5
    travel = 2 * half * MU_PER_MM
    slower_lead = np.maximum(-np.diff(wanted_mu, axis=0), 0.0)
    lead = travel / 2 + np.vstack((np.zeros(wanted_mu.shape[1]), np.cumsum(travel + slower_lead, axis=0)))
    trail = lead + wanted_mu
    used = np.flatnonzero(wanted_mu.max(axis=0) > FLUENCE_FLOOR * max(float(wanted_mu.max()), 1e-6))
    total = float(trail[-1, used].max()) + travel / 2 if used.size else 1.0
    place = np.concatenate(([u_mm[0] - half], u_mm, [u_mm[-1] + half]))
    time = np.linspace(0.0, total, control_points)
    x1 = np.full((control_points, wanted_mu.shape[1]), place[0])
    x2 = x1.copy()
    for p in used:
        for passed, ends in ((lead[:, p], x2), (trail[:, p], x1)):
            moments = np.concatenate(([passed[0] - travel / 2], passed, [passed[-1] + travel / 2]))
            ends[:, p] = np.interp(time, moments, place)
    return total, np.minimum(x1, x2).round(1), x2.round(1)
