"""Condition channels for the forms of distance map that DoseDiff compares, and for masks of targets by level.

``psdm_Parotid_L``, ``isdm_target_high``, ``tsbdm_SpinalCord``, ``mask_target_low``: the form, then the structure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from custom.geometry.distance import DISTANCE_FORMS

if TYPE_CHECKING:
    from custom.transforms.condition import Conditions

__all__ = ["DISTANCE_BUILDERS"]


def _channel(c: Conditions, mask: np.ndarray | None, form: str) -> np.ndarray:
    build, absent = DISTANCE_FORMS[form]
    if mask is None:
        return np.full(c.case.grid.shape, absent, dtype=np.float32)
    return build(mask, c.case.grid.spacing_mm)


def _builders(form: str) -> dict[str, Callable[[Conditions, str], np.ndarray]]:
    """Targets come first: a name is matched to the first prefix that fits."""
    return {
        f"{form}_target_": lambda c, level: _channel(c, c.levels.get(level), form),
        f"{form}_": lambda c, roi: _channel(c, c.mask(roi), form),
    }


DISTANCE_BUILDERS: dict[str, Callable[[Conditions, str], np.ndarray]] = {
    prefix: builder for form in DISTANCE_FORMS for prefix, builder in _builders(form).items()
}
