"""The patient behind a network's input: structures, prescriptions and spacing, read back from the condition channels.

Signed distance channels are positive inside (``custom.geometry.distance``), so their sign is the mask itself; crops,
flips and half precision leave it as it is. A loss, a metric or an inferer that is handed the image alone can therefore
judge it by the same constraint rows as the report.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from custom.case import BODY, Beam, Case, CaseError, Grid, Site, Technique

__all__ = ["LEVEL_NAMES", "PRESCRIPTION_LEVEL_GY", "SPACING_UNIT_MM", "case_from_conditions"]

# What ``custom.transforms.condition`` divides by; the round trip is tested.
PRESCRIPTION_LEVEL_GY = 70.0
SPACING_UNIT_MM = 4.0
LEVEL_NAMES = {"high": "PTV_High", "mid": "PTV_Mid", "low": "PTV_Low"}
NEEDED = ("body", "prescription", "prescription_level", "spacing_x", "spacing_y", "spacing_z")


def case_from_conditions(image: np.ndarray, names: Sequence[str]) -> Case:
    """Rebuild a case from its condition channels.

    Args:
        image: ``(C, X, Y, Z)``, one patient; the context channels are constant over the volume.
        names: name of every channel, see ``custom.transforms.condition``. Structures are those of ``sdm_*`` and
            ``mask_*``; the targets are the levels ``sdm_target_high``, ``_mid`` and ``_low``.

    Returns:
        A case without CT and dose, whose targets are called ``PTV_High``, ``PTV_Mid`` and ``PTV_Low``. A structure
        that is absent, or not within the image, is no mask; ``PTV_High`` is always there, if empty, since it holds
        the highest prescription.

    Raises:
        CaseError: a channel that is needed is missing.
    """
    channel = {name: np.asarray(image[i]) for i, name in enumerate(names)}
    if missing := [name for name in NEEDED if name not in channel]:
        raise CaseError(f"conditions: no channels {missing} among {list(names)}; the protocol cannot be judged")

    def value(name: str, otherwise: float = 0.0) -> float:
        return float(channel[name].max()) if name in channel else otherwise

    masks = {BODY: channel["body"] > 0.5}
    levels = {LEVEL_NAMES["high"]: np.zeros(masks[BODY].shape, dtype=bool)}
    for name, array in channel.items():
        kind, _, structure = name.partition("_")
        if kind not in ("sdm", "mask") or value(f"has_{structure}", 1.0) <= 0.5:
            continue
        mask = array > (0.0 if kind == "sdm" else 0.5)
        if mask.any():
            level = structure.removeprefix("target_")
            (levels if level in LEVEL_NAMES else masks)[LEVEL_NAMES.get(level, structure)] = mask
    spacing_mm = [SPACING_UNIT_MM * value(f"spacing_{axis}") for axis in "xyz"]
    grid = Grid.axis_aligned(masks[BODY].shape, spacing_mm)
    highest_gy = PRESCRIPTION_LEVEL_GY * value("prescription_level")
    return Case(
        name="conditions",
        grid=grid,
        ct_hu=None,
        masks=masks | levels,
        prescription_gy={name: highest_gy * _own_share(name, levels, channel["prescription"]) for name in levels},
        beams=(Beam("unknown", (0.0,), (0.0, 0.0, 0.0)),),
        technique=Technique.VMAT if value("is_vmat") > 0.5 else Technique.IMRT,
        site=Site.LUNG if value("is_lung") > 0.5 else Site.HEAD_NECK,
    )


def _own_share(name: str, levels: dict[str, np.ndarray], painted: np.ndarray) -> float:
    """A level's prescription as a share of the highest, where no other level is painted over it."""
    if name == LEVEL_NAMES["high"]:
        return 1.0
    own = levels[name].copy()
    for other, mask in levels.items():
        if other != name:
            own &= ~mask
    return float(np.median(painted[own])) if own.any() else float(painted[levels[name]].min())
