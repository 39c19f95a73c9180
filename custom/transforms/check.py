"""Say when a case lies outside what the model has learnt, or when its prediction cannot be right."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform

from custom.case import Case, Keys

__all__ = ["PlausibilityWarningsd"]

logger = logging.getLogger(__name__)


class PlausibilityWarningsd(MapTransform):
    """Compare the case with the training data's ranges, and the dose with what any plan looks like.

    The warnings go to the log and, as ``data["warnings"]``, to the report.

    Args:
        keys: key of the dose in Gy on the case's grid.
        sites, techniques: seen in training.
        prescription_gy: lowest and highest prescription of the highest target seen.
        directions: lowest and highest number of beam directions seen.
        target_cc: lowest and highest volume of all targets seen.
        hot_spot: highest plausible dose as a share of the prescription.
        coverage: lowest plausible D95 of the highest target as a share of its prescription.
    """

    def __init__(self, keys: KeysCollection = Keys.PRED, sites: Sequence[str] = (), techniques: Sequence[str] = (),
                 prescription_gy: Sequence[float] = (0.0, 200.0), directions: Sequence[int] = (1, 360),
                 target_cc: Sequence[float] = (0.0, 1e6), hot_spot: float = 1.25, coverage: float = 0.8) -> None:
        super().__init__(keys)
        self.seen = {"site": tuple(sites), "technique": tuple(techniques)}
        self.ranges = {"prescription (Gy)": tuple(prescription_gy), "beam directions": tuple(directions),
                       "target volume (cc)": tuple(target_cc)}
        self.hot_spot, self.coverage = hot_spot, coverage

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        out = dict(data)
        case: Case = out[Keys.CASE]
        found = list(out.get("warnings", ())) + self.unlike_training(case)
        for key in self.key_iterator(out):
            found += self.implausible(case, np.asarray(out[key][0]))
        for text in found:
            logger.warning("case %s: %s", case.name, text)
        out["warnings"] = found
        return out

    def unlike_training(self, case: Case) -> list[str]:
        """What of the case the training data did not hold."""
        texts = [f"{name} {value} was not in the training data ({', '.join(self.seen[name])}): expect larger errors"
                 for name, value in (("site", case.site), ("technique", case.technique))
                 if self.seen[name] and value not in self.seen[name]]
        values = {"prescription (Gy)": case.highest_prescription_gy,
                  "beam directions": sum(len(beam.gantry_deg) for beam in case.beams),
                  "target volume (cc)": float(case.target_mask().sum() * case.grid.voxel_cc)}
        return texts + [f"{name} {values[name]:.4g} is outside the training data's {low:g} to {high:g}: expect larger "
                        "errors" for name, (low, high) in self.ranges.items() if not low <= values[name] <= high]

    def implausible(self, case: Case, dose_gy: np.ndarray) -> list[str]:
        """What of the dose no clinical plan would show."""
        roi, gy = next(iter(case.targets.items()))
        texts = []
        if dose_gy.max() > self.hot_spot * gy:
            texts.append(f"the hottest voxel has {dose_gy.max():.1f} Gy, over {self.hot_spot:.0%} of {gy:g} Gy")
        inside = dose_gy[case.masks[roi]]
        if inside.size and np.percentile(inside, 5) < self.coverage * gy:
            texts.append(f"D95 of {roi} is {np.percentile(inside, 5):.1f} Gy, under {self.coverage:.0%} of {gy:g} Gy")
        return texts
