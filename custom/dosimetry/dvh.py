"""Dose-volume histograms, and the one notation in which dose metrics are written.

A metric is written as *what*, *where* and, in brackets, the *unit of the result*::

    Mean[Gy]  Max[Gy]  Min[Gy]     Mean[%]: the same as a share of the prescription
    D95%[Gy]  D0.1cc[Gy]  D95%[%]  least dose of the hottest 95 % or 0.1 cm^3 of the structure
    V20Gy[%]  V20Gy[cc]  V95%[%]   share or volume of the structure at 20 Gy, or at 95 % of the prescription, and above

Voxels stand for equal volumes with the dose of their centre; between them the dose of a volume is interpolated linearly
(Hazen's plotting positions: the i-th hottest of n voxels ends the volume ``(i - 0.5) / n``), which is unbiased for a
structure in a linear dose gradient. Scores that prescribe another rule (OpenKBP) keep theirs in ``custom.metrics``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from custom.case import CaseError

__all__ = ["Dvh", "Metric", "cumulative_dvh", "dose_at_volume", "parse_metric", "volume_at_dose"]

_STATISTIC = re.compile(r"^(Mean|Max|Min)\[(Gy|%)\]$")
_DOSE_AT = re.compile(r"^D(\d+(?:\.\d+)?)(%|cc)\[(Gy|%)\]$")
_VOLUME_AT = re.compile(r"^V(\d+(?:\.\d+)?)(Gy|%)\[(%|cc)\]$")
_EXAMPLES = "'Mean[Gy]', 'Max[Gy]', 'Min[Gy]', 'D95%[Gy]', 'D0.1cc[Gy]', 'D95%[%]', 'V20Gy[%]', 'V20Gy[cc]', 'V95%[%]'"


@dataclass(frozen=True)
class Metric:
    """One dose metric of a structure.

    Args:
        kind: ``"Mean"``, ``"Max"``, ``"Min"``, ``"D"`` (dose at a volume) or ``"V"`` (volume at a dose).
        unit: unit of the result: Gy or % (of the prescription) for doses, % (of the structure) or cc for volumes.
        at: the volume of a ``D`` or the dose of a ``V``.
        at_unit: ``"%"`` or ``"cc"`` for a ``D``, ``"Gy"`` or ``"%"`` (of the prescription) for a ``V``.
    """

    kind: str
    unit: str
    at: float | None = None
    at_unit: str | None = None

    def __str__(self) -> str:
        return f"{self.kind}[{self.unit}]" if self.at is None else f"{self.kind}{self.at:g}{self.at_unit}[{self.unit}]"

    @property
    def is_dose(self) -> bool:
        """True when the result is a dose, False when it is a volume."""
        return self.kind != "V"

    @property
    def needs_prescription(self) -> bool:
        """True when the metric can only be evaluated against a prescription."""
        return (self.is_dose and self.unit == "%") or (self.kind == "V" and self.at_unit == "%")

    def evaluate(self, dose_in_roi_gy: np.ndarray, voxel_cc: float, prescription_gy: float | None = None) -> float:
        """The metric's value.

        Args:
            dose_in_roi_gy: dose of the structure's voxels, any shape.
            voxel_cc: volume of one voxel in cm^3.
            prescription_gy: what ``%`` of dose refers to; needed only where :attr:`needs_prescription`.

        Returns:
            The value in :attr:`unit`; nan for a structure without voxels.

        Raises:
            CaseError: a prescription is needed and was not given.
        """
        if self.needs_prescription and prescription_gy is None:
            raise CaseError(f"metric {self}: a share of the prescription; give the prescribed dose in Gy")
        dose_gy = np.asarray(dose_in_roi_gy).ravel()
        if dose_gy.size == 0:
            return float("nan")
        if self.kind == "V":
            at_gy = self.at if self.at_unit == "Gy" else self.at / 100 * prescription_gy
            share = volume_at_dose(dose_gy, at_gy)
            return 100 * share if self.unit == "%" else share * dose_gy.size * voxel_cc
        value_gy = self._dose_gy(dose_gy, voxel_cc)
        return value_gy if self.unit == "Gy" else 100 * value_gy / prescription_gy

    def _dose_gy(self, dose_gy: np.ndarray, voxel_cc: float) -> float:
        if self.kind == "Mean":
            return float(dose_gy.mean(dtype=np.float64))
        if self.kind == "Max":
            return float(dose_gy.max())
        if self.kind == "Min":
            return float(dose_gy.min())
        share = self.at / 100 if self.at_unit == "%" else self.at / (dose_gy.size * voxel_cc)
        return dose_at_volume(dose_gy, share)


def parse_metric(text: str) -> Metric:
    """Read a metric such as ``"D95%[Gy]"``.

    Raises:
        CaseError: text that is not in the notation, or a volume above 100 %.
    """
    text = text.strip()
    if match := _STATISTIC.match(text):
        return Metric(match[1], match[2])
    if match := _DOSE_AT.match(text):
        at = float(match[1])
        if at <= 0 or (match[2] == "%" and at > 100):
            raise CaseError(
                f"metric {text!r}: the volume must lie above 0 and at most 100 %, found {match[1]}{match[2]}"
            )
        return Metric("D", match[3], at, match[2])
    if match := _VOLUME_AT.match(text):
        return Metric("V", match[3], float(match[1]), match[2])
    raise CaseError(f"metric {text!r} is not understood; write it like one of {_EXAMPLES}")


def dose_at_volume(dose_in_roi_gy: np.ndarray, share: float) -> float:
    """Least dose of the hottest ``share`` (0 to 1) of the structure, in Gy; shares above 1 give the minimum."""
    return float(np.quantile(dose_in_roi_gy, 1 - min(max(share, 0.0), 1.0), method="hazen"))


def volume_at_dose(dose_in_roi_gy: np.ndarray, at_gy: float) -> float:
    """Share of the structure (0 to 1) that receives at least ``at_gy``."""
    return float(np.count_nonzero(dose_in_roi_gy >= at_gy) / dose_in_roi_gy.size)


@dataclass(frozen=True)
class Dvh:
    """A cumulative dose-volume histogram.

    Args:
        dose_gy: rising doses.
        volume_percent: share of the structure that receives at least that dose; ``volume_percent[0]`` is 100.
        volume_cc: volume of the whole structure.
    """

    dose_gy: np.ndarray
    volume_percent: np.ndarray
    volume_cc: float


def cumulative_dvh(
    dose_gy: np.ndarray, mask: np.ndarray, voxel_cc: float, step_gy: float = 0.1, stop_gy: float | None = None
) -> Dvh:
    """Cumulative DVH of the voxels in ``mask``.

    Args:
        dose_gy: dose ``[i, j, k]``.
        mask: boolean ``[i, j, k]``.
        voxel_cc: volume of one voxel in cm^3.
        step_gy: distance between the doses of the histogram.
        stop_gy: last dose; by default one or two steps above the structure's maximum.

    Raises:
        CaseError: arrays of different shape, or a mask without voxels.
    """
    if dose_gy.shape != mask.shape:
        raise CaseError(f"DVH: the dose has shape {dose_gy.shape}, the mask {mask.shape}")
    inside = np.sort(dose_gy[mask])
    if inside.size == 0:
        raise CaseError("DVH: the mask has no voxels; leave absent structures out")
    stop = float(inside[-1]) + step_gy if stop_gy is None else stop_gy
    bins = step_gy * np.arange(int(np.ceil(stop / step_gy)) + 1)
    percent = 100 * (1 - np.searchsorted(inside, bins, side="left") / inside.size)
    return Dvh(bins, percent, inside.size * voxel_cc)
