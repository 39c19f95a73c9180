"""Condition channels: each kind has one builder, the config names the channels."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from custom.case import Case, CaseError, DoseScale, Keys, Site, Technique
from custom.geometry.distance import signed_distance_mm
from custom.metrics import DoseScore
from custom.networks.broad import SPACING_UNIT_MM
from custom.physics.fluence import BeamModel, Plan, load_objectives, load_trade_offs, plan_dose, traded
from custom.physics.open_field import open_field_dose
from custom.transforms.distance_channels import DISTANCE_BUILDERS

__all__ = ["AppendContextd", "ConditionChannelsd", "PackLabeld", "ReconstructionTargetd",
           "TrainingTensorsd"]

DISTANCE_SCALE_MM = 50.0
ABSENT_DISTANCE = -1.0
PAIRS = {"Lungs": ("Lung_L", "Lung_R")}
CONTEXT = "context"
SECTOR_DEG = 40  # of gantry angles: one beam each of nine equispaced ones, some directions of an arc


class Conditions:
    """Builds channels of one case; what several channels share is computed once.

    Args:
        case: on the working grid.
        plan_options: of :func:`custom.physics.fluence.plan_dose`.
        beamlet_mm: beamlet size of everything that is computed from the beams.
        trade_offs: the plan priors beside the main one, see :func:`custom.physics.fluence.load_trade_offs`.
    """

    def __init__(self, case: Case, plan_options: Mapping[str, object] | None = None, beamlet_mm: float = 6.0,
                 trade_offs: Mapping[str, Mapping[str, float]] | None = None) -> None:
        self.case, self.trade_offs = case, trade_offs or {}
        self.plan_options, self.beamlet_mm = plan_options or {}, beamlet_mm
        self._plans: dict[str, Plan] = {}

    def build(self, name: str) -> np.ndarray | float:
        """The channel ``name``: an array ``[i, j, k]``, or a number for a context channel."""
        for prefix, builder in BUILDERS.items():
            if name == prefix or (prefix.endswith("_") and name.startswith(prefix)):
                return builder(self, name[len(prefix):])
        raise CaseError(f"condition channel {name!r} is unknown; known are {', '.join(sorted(BUILDERS))} "
                        "(a name that ends in '_' is followed by a structure or a level)")

    def mask(self, roi: str) -> np.ndarray | None:
        """Mask of a structure or of a pair that the case gives in halves; None when absent or empty."""
        parts = [self.case.masks[name] for name in (roi, *PAIRS.get(roi, ())) if name in self.case.masks]
        mask = np.logical_or.reduce(parts) if parts else None
        return mask if mask is not None and mask.any() else None

    @cached_property
    def levels(self) -> dict[str, np.ndarray]:
        """Targets by level: ``high``, ``low`` where there are two or more, ``mid`` for those between."""
        doses = sorted({*self.case.prescription_gy.values()}, reverse=True)
        names = {doses[0]: "high"} if doses else {}
        if len(doses) > 1:
            names.update(dict.fromkeys(doses[1:-1], "mid"))
            names[doses[-1]] = "low"
        found: dict[str, np.ndarray] = {}
        for roi, gy in self.case.prescription_gy.items():
            level = names[gy]
            found[level] = found[level] | self.case.masks[roi] if level in found else self.case.masks[roi]
        return {level: mask for level, mask in found.items() if mask.any()}

    @cached_property
    def beam_model(self) -> BeamModel:
        return BeamModel(self.case, self.beamlet_mm)

    @cached_property
    def beam_paths(self) -> dict[str, np.ndarray]:
        """Open-field dose of the targets at or above each level."""
        order = [level for level in ("high", "mid", "low") if level in self.levels]
        unions = [np.logical_or.reduce([self.levels[k] for k in order[: n + 1]]) for n in range(len(order))]
        return dict(zip(order, open_field_dose(self.beam_model, unions), strict=True))

    def sector_dose(self, middle_deg: int) -> np.ndarray:
        """The plan's dose from a sector of gantry angles, as a fraction of the highest prescription."""
        dose, model = np.zeros(self.case.grid.shape, dtype=np.float32), self.beam_model
        for direction, field, fluence in zip(model.directions, model.fields, self.plan().fluences, strict=True):
            if int(direction.gantry_deg % 360 / SECTOR_DEG + 0.5) * SECTOR_DEG % 360 == middle_deg:
                dose += model.volume(field.forward(fluence))
        return DoseScale(self.case.highest_prescription_gy).to_network(dose)

    def planned(self, trade_off: str = "") -> np.ndarray:
        """Planned dose as a fraction of the highest prescription; of the file's own weights, or of a trade-off."""
        return DoseScale(self.case.highest_prescription_gy).to_network(self.plan(trade_off).dose_gy)

    def plan(self, trade_off: str = "") -> Plan:
        """The plan of the file's own weights, or of a trade-off."""
        if trade_off not in self._plans:
            options = dict(self.plan_options)
            if trade_off:
                if trade_off not in self.trade_offs:
                    raise CaseError(f"condition channel 'plan_prior_{trade_off}': the planning objectives have no such "
                                    f"trade-off; they have {', '.join(sorted(self.trade_offs)) or 'none'}")
                objectives = options.get("objectives") or load_objectives()
                options["objectives"] = traded(objectives, self.trade_offs[trade_off])
            self._plans[trade_off] = plan_dose(self.case, beams=self.beam_model, **options)
        return self._plans[trade_off]

    def plan_mean(self, mask: np.ndarray | None) -> float:
        """Mean of the planned dose in a structure; 0 without it."""
        return 0.0 if mask is None else float(self.planned()[mask].mean())

    def overlap(self, mask: np.ndarray | None) -> float:
        """Share of a structure that lies in the targets; 0 without it."""
        return 0.0 if mask is None else float(self.case.target_mask()[mask].mean())

    def litres(self, mask: np.ndarray | None) -> float:
        """Volume of a structure; 0 without it."""
        return 0.0 if mask is None else float(mask.sum() * np.prod(self.case.grid.spacing_mm) * 1e-6)

    def length(self, mask: np.ndarray | None) -> float:
        """Extent of a structure along the patient in dm; 0 without it."""
        if mask is None or not mask.any():
            return 0.0
        slices = np.flatnonzero(mask.any(axis=(0, 1)))
        return float((slices[-1] - slices[0] + 1) * self.case.grid.spacing_mm[2] / 100.0)

    def signed_distance(self, mask: np.ndarray | None) -> np.ndarray:
        if mask is None:
            return np.full(self.case.grid.shape, ABSENT_DISTANCE, dtype=np.float32)
        return signed_distance_mm(mask, self.case.grid.spacing_mm, DISTANCE_SCALE_MM) / DISTANCE_SCALE_MM


def _ct(c: Conditions, _: str) -> np.ndarray:
    if c.case.ct_hu is None:
        return np.zeros(c.case.grid.shape, dtype=np.float32)
    return (np.clip(c.case.ct_hu, -1000.0, 2000.0) / 1000.0).astype(np.float32)


def _prescription(c: Conditions, _: str) -> np.ndarray:
    painted = np.zeros(c.case.grid.shape, dtype=np.float32)
    for roi, gy in reversed(c.case.targets.items()):
        painted[c.case.masks[roi]] = gy / c.case.highest_prescription_gy
    return painted


def _beam(c: Conditions, level: str) -> np.ndarray:
    found = c.beam_paths.get(level)
    return np.zeros(c.case.grid.shape, dtype=np.float32) if found is None else found


def _plan_beam(c: Conditions, angle: str) -> np.ndarray:
    if not angle.isdecimal() or int(angle) % SECTOR_DEG or int(angle) >= 360:
        raise CaseError(f"condition channel 'plan_beam_{angle}': the plan's dose is told apart by sectors of "
                        f"{SECTOR_DEG} degrees of the gantry; expected plan_beam_0, plan_beam_{SECTOR_DEG}, ...")
    return c.sector_dose(int(angle))


def _mask(c: Conditions, roi: str) -> np.ndarray:
    mask = c.mask(roi)
    return np.zeros(c.case.grid.shape, dtype=np.float32) if mask is None else mask.astype(np.float32)


def _spacing(c: Conditions, axis: str) -> float:
    return float(c.case.grid.spacing_mm["xyz".index(axis)] / SPACING_UNIT_MM)


BUILDERS: dict[str, Callable[[Conditions, str], np.ndarray | float]] = {
    "ct": _ct,
    "body": lambda c, _: c.case.body.astype(np.float32),
    "prescription": _prescription,
    "plan_prior_": lambda c, trade_off: c.planned(trade_off),
    "plan_prior": lambda c, _: c.planned(),
    "plan_beam_": _plan_beam,
    "beam_": _beam,
    "mask_": _mask,
    "sdm_target_": lambda c, level: c.signed_distance(c.levels.get(level)),
    "sdm_": lambda c, roi: c.signed_distance(c.mask(roi)),
    "has_ct": lambda c, _: float(c.case.ct_hu is not None),
    "has_target_": lambda c, level: float(level in c.levels),
    "has_": lambda c, roi: float(c.mask(roi) is not None),
    "volume_target_": lambda c, level: c.litres(c.levels.get(level)),
    "volume_body": lambda c, _: c.litres(c.case.body) / 10.0,  # near 1, as the others
    "length_target": lambda c, _: c.length(c.case.target_mask()),
    "length_body": lambda c, _: c.length(c.case.body),
    "overlap_": lambda c, roi: c.overlap(c.mask(roi)),
    "plan_mean_": lambda c, roi: c.plan_mean(c.mask(roi)),
    "is_vmat": lambda c, _: float(c.case.technique == Technique.VMAT),
    "is_lung": lambda c, _: float(c.case.site == Site.LUNG),
    "prescription_level": lambda c, _: c.case.highest_prescription_gy / 70.0,
    "spacing_": _spacing,
}
# before the rest: a name is matched to the first prefix that fits, and "mask_target_" is also a "mask_"
BUILDERS = {**DISTANCE_BUILDERS, **BUILDERS}


class ConditionChannelsd(MapTransform):
    """Build the network's conditions from ``data["work"]``.

    Sets ``image`` (``(C, X, Y, Z)`` float32 MetaTensor of the spatial channels), ``context`` (float32 vector of the
    context channels), ``body``, and where a reference dose came along ``label`` (fraction of the highest prescription).

    Args:
        keys: key of the working case.
        spatial_channels, context_channels: names, see ``BUILDERS``.
        plan_objectives: file with the planning objectives; None takes ``configs/plan_objectives.json``.
        plan_beamlet_mm, plan_iterations: effort of the plan prior.
        constraints: protocol whose limits the planning objectives follow; None takes ``configs/constraints.json``.
    """

    def __init__(self, keys: KeysCollection = "work", spatial_channels: Sequence[str] = (),
                 context_channels: Sequence[str] = (), plan_objectives: str | None = None,
                 plan_beamlet_mm: float = 6.0, plan_iterations: int = 40, constraints: str | None = None) -> None:
        super().__init__(keys)
        self.spatial_channels, self.context_channels = tuple(spatial_channels), tuple(context_channels)
        self.plan_options = {"objectives": load_objectives(plan_objectives, constraints), "iterations": plan_iterations}
        self.plan_beamlet_mm = plan_beamlet_mm
        self.trade_offs = load_trade_offs(plan_objectives)

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        out = dict(data)
        for key in self.key_iterator(out):
            case: Case = out[key]
            conditions = Conditions(case, self.plan_options, self.plan_beamlet_mm, self.trade_offs)
            spatial = np.empty((len(self.spatial_channels), *case.grid.shape), dtype=np.float32)
            for channel, name in zip(spatial, self.spatial_channels, strict=True):
                channel[:] = conditions.build(name)
            affine = torch.as_tensor(case.grid.ras_affine)
            out[Keys.IMAGE] = MetaTensor(torch.from_numpy(spatial), affine=affine)
            out[CONTEXT] = torch.tensor([float(conditions.build(name)) for name in self.context_channels])
            out[Keys.BODY] = MetaTensor(torch.from_numpy(case.body[None].copy()), affine=affine)
            if case.dose_gy is not None:
                label = DoseScale(case.highest_prescription_gy).to_network(case.dose_gy).astype(np.float32)
                out[Keys.LABEL] = MetaTensor(torch.from_numpy(label[None].copy()), affine=affine)
        return out


class TrainingTensorsd(MapTransform):
    """Keep only what training needs, small: half-precision tensors, no case.

    Args:
        keys: key of the working case.
        roi_names: structures of the ``rois`` tensor ``(R, X, Y, Z)`` uint8, in this order; absent ones are zero.
            ``"target_high"``, ``"target_mid"``, ``"target_low"`` are the targets by level.
    """

    def __init__(self, keys: KeysCollection = "work", roi_names: Sequence[str] = ()) -> None:
        super().__init__(keys)
        self.roi_names = tuple(roi_names)

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        case: Case = data[self.keys[0]]
        if Keys.LABEL not in data:
            raise CaseError(f"case {case.name}: training needs a reference dose; found none in {case.source}")
        conditions = Conditions(case)
        rois = torch.zeros((len(self.roi_names), *case.grid.shape), dtype=torch.uint8)
        for row, name in zip(rois, self.roi_names, strict=True):
            level = name.removeprefix("target_")
            mask = conditions.levels.get(level) if name != level else conditions.mask(name)
            if mask is not None:
                row.copy_(torch.from_numpy(mask))
        return {
            Keys.IMAGE: torch.as_tensor(data[Keys.IMAGE]).to(torch.float16).contiguous(),
            CONTEXT: data[CONTEXT],
            Keys.LABEL: torch.as_tensor(data[Keys.LABEL]).to(torch.float16).contiguous(),
            Keys.BODY: torch.as_tensor(data[Keys.BODY]).to(torch.uint8).contiguous(),
            Keys.ROIS: rois,
            "prescription_gy": torch.tensor(case.highest_prescription_gy),
            "voxel_cc": torch.tensor(case.grid.voxel_cc),
        }


class AppendContextd(MapTransform):
    """Append the context vector to ``image`` as constant channels, in float32."""

    def __init__(self, keys: KeysCollection = Keys.IMAGE) -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        out = dict(data)
        for key in self.key_iterator(out):
            image = out[key].float()
            context = out[CONTEXT].to(image.device).reshape(-1, 1, 1, 1).expand(-1, *image.shape[1:])
            out[key] = torch.cat([image, context])
        return out


class PackLabeld(MapTransform):
    """Give ``label`` a second channel with the prescription inside the body, as :class:`DoseScore` wants it."""

    def __init__(self, keys: KeysCollection = Keys.LABEL) -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        out = dict(data)
        for key in self.key_iterator(out):
            out[key] = DoseScore.pack(out[key].float(), out[Keys.BODY], float(out["prescription_gy"]))
        return out


class ReconstructionTargetd(MapTransform):
    """The CT in [0, 1] as ``image`` and ``label``, for judging an autoencoder; see ``LightweightVAE3D.scale_ct``."""

    def __init__(self, keys: KeysCollection = Keys.IMAGE, ct_channel: int = 0) -> None:
        super().__init__(keys)
        self.ct_channel = ct_channel

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        ct = data[Keys.IMAGE][self.ct_channel : self.ct_channel + 1].float()
        ct = ((ct + 1.0) / 2.0).clamp(0.0, 1.0)
        return {**data, Keys.IMAGE: ct, Keys.LABEL: ct, "prescription_gy": 1.0}
