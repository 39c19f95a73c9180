"""Which slices of a patient are worth a look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from custom.case import BODY, Case
from custom.dosimetry.constraints import FAILED, Verdict
from custom.dosimetry.regions import Region, drawn, regions

__all__ = ["find_views"]


def find_views(case: Case, dose_gy: np.ndarray, verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Voxels through which to cut: the hottest, the high-dose target's centre, the extreme one of the worst violation.

    Args:
        case: the patient.
        dose_gy: predicted dose ``[i, j, k]``.
        verdicts: the protocol's, of that dose.

    Returns:
        ``{"title", "index" (voxel), "position_lps_mm", "dose_gy"}`` each; never the same voxel twice.
    """
    spots = [("Hottest spot", _extreme(region, dose_gy)) for region in _body(case)]
    spots += [("Centre of the high-dose target", _centre(region)) for region in regions("PTV_High", case)]
    failed = [verdict for verdict in verdicts if verdict.status == FAILED]
    for verdict in sorted(failed, key=lambda v: -v.severity)[:1]:
        at_most = verdict.constraint.at_most
        title = f"Worst violation, {'hottest' if at_most else 'coldest'} voxel: {verdict.structure}, "
        for region in regions(verdict.constraint.structure, case):
            if region.name == verdict.structure:
                spots.append((title + str(verdict.constraint.metric), _extreme(region, dose_gy, at_most)))
    views = {index: title for title, index in reversed(spots)}  # the first title of a voxel stays
    ordered = dict.fromkeys(index for _, index in spots)
    return [{"title": views[index], "index": list(index), "dose_gy": float(dose_gy[index]),
             "position_lps_mm": np.round(case.grid.to_world(np.array(index)), 1).tolist()} for index in ordered]


def _body(case: Case) -> list[Region]:
    region = drawn(BODY, case)
    return [] if region is None else [region]


def _extreme(region: Region, dose_gy: np.ndarray, hottest: bool = True) -> tuple[int, ...]:
    """The region's voxel of the highest or lowest dose."""
    values = np.where(region.mask, dose_gy[region.box] if hottest else -dose_gy[region.box], -np.inf)
    return tuple(int(n + s.start) for n, s in zip(np.unravel_index(values.argmax(), values.shape), region.box))


def _centre(region: Region) -> tuple[int, ...]:
    """The region's voxel nearest to its centre of mass."""
    index = np.argwhere(region.mask)
    nearest = index[((index - index.mean(axis=0)) ** 2).sum(axis=1).argmin()]
    return tuple(int(n + s.start) for n, s in zip(nearest, region.box))
