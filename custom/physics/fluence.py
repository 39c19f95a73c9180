"""Fluence optimisation: the plan prior and the synthetic patients' plans."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy import ndimage, optimize
from threadpoolctl import threadpool_limits

from custom.case import BODY, Case, CaseError
from custom.physics.limits import follow, own_objectives, read_protocol
from custom.physics.pencil_beam import Direction, Field, density_from_hu
from custom.places import bundle_folder

__all__ = ["BeamModel", "Objective", "Plan", "load_objectives", "load_trade_offs", "plan_dose", "traded"]

RING = "Ring"
KINDS = ("min", "max")
LEVELS = ("high", "mid", "low", "lower")  # of the targets; "lower": all but the highest
SMOOTHING = 0.02  # weight of the fluences' roughness


def objectives_path() -> Path:
    """``configs/plan_objectives.json`` of the bundle."""
    return bundle_folder() / "configs" / "plan_objectives.json"


@dataclass(frozen=True)
class Objective:
    """One row of the planning objectives: penalises ``weight * mean(excess^2)`` over a structure's voxels.

    Args:
        structure: TG-263 name; ``"Target"`` for every target, ``"Ring"`` for the tissue 4 to 30 mm around the targets,
            ``"Body"`` for all tissue outside the targets.
        kind: ``"min"`` or ``"max"``.
        dose_gy: limit in Gy, or None when ``dose_share`` is given.
        dose_share: limit as a share of the structure's own prescription (targets), or the highest one (others).
        weight: relative weight.
        level: for targets only, by prescription: one of ``LEVELS``, or None for every target. ``low`` and ``mid``
            ask for two and three levels, as PTV_Low and PTV_Mid do in :mod:`custom.dosimetry.regions`.
    """

    structure: str
    kind: str
    weight: float
    dose_gy: float | None = None
    dose_share: float | None = None
    level: str | None = None


@dataclass(frozen=True)
class Plan:
    """A planned dose and the fluence that gives it.

    Args:
        dose_gy: on the case's grid, zero outside the body.
        fluences: one ``(n_u, n_w)`` array a direction, whole course, relative units.
        u_mm, w_mm: beamlet centres at the isocentre plane (IEC X, and IEC Y towards superior).
        gantry_deg: one angle a direction.
    """

    dose_gy: np.ndarray
    fluences: list[np.ndarray]
    u_mm: list[np.ndarray]
    w_mm: list[np.ndarray]
    gantry_deg: list[float]


def load_objectives(
    path: str | Path | None = None, constraints: str | Path | Sequence[dict] | None = None
) -> tuple[Objective, ...]:
    """Read the planning objectives, one JSON object a row, and let them follow the protocol's limits.

    Args:
        path: a file like ``configs/plan_objectives.json``, which is the default.
        constraints: the protocol whose limits the rows follow (:mod:`custom.physics.limits`), a file or its rows; by
            default the ``constraints.json`` beside the objectives, where there is one.

    Raises:
        CaseError: a row that cannot be read; names the file and the row.
    """
    path = Path(path) if path else objectives_path()
    if constraints is None:
        beside = path.parent / "constraints.json"
        constraints = beside if beside.is_file() else []
    protocol = read_protocol(constraints) if isinstance(constraints, (str, Path)) else list(constraints)
    try:
        rows = json.loads(path.read_text())["objectives"]
        found = tuple(Objective(**follow(row, protocol)) for row in rows)
        found += tuple(Objective(**row) for row in own_objectives(protocol))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CaseError(f"{path}: expected {{'objectives': [rows of {Objective.__name__}]}}, found: {error}") from error
    for number, row in enumerate(found, 1):
        numbers = [value for value in (row.dose_gy, row.dose_share, row.weight) if value is not None]
        sound = all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in numbers)
        one_dose = (row.dose_gy is None) != (row.dose_share is None)
        known = row.kind in KINDS and (row.level is None or row.level in LEVELS)
        if not known or not one_dose or not sound or not row.weight > 0:
            raise CaseError(f"{path}, row {number}: wants kind {KINDS}, level {LEVELS} or null, one of dose_gy and "
                            f"dose_share, and a positive weight, as numbers; found {row}")
    return found


def load_trade_offs(path: str | Path | None = None) -> dict[str, dict[str, float]]:
    """``trade_offs`` of a file like ``configs/plan_objectives.json``: name -> structure -> factor of :func:`traded`.

    Raises:
        CaseError: a factor that is no positive number; names the file.
    """
    path = Path(path) if path else objectives_path()
    try:
        found = {str(name): {str(roi): float(factor) for roi, factor in factors.items()}
                 for name, factors in json.loads(path.read_text()).get("trade_offs", {}).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CaseError(f"{path}: expected trade_offs as {{'name': {{'Target': 4.0}}}}, found: {error}") from error
    for name, factors in found.items():
        if not all(factor > 0 for factor in factors.values()):
            raise CaseError(f"{path}: trade-off {name!r} wants positive factors; found {factors}")
    return found


def traded(objectives: Sequence[Objective], factors: Mapping[str, float]) -> tuple[Objective, ...]:
    """The objectives with the weights of some structures' rows multiplied, as ``{"Target": 4.0}``."""
    return tuple(replace(row, weight=row.weight * factors.get(row.structure, 1.0)) for row in objectives)


class BeamModel:
    """The case's beams through its body, made once for everything that is computed from them.

    Args:
        case: on an axis-aligned grid. Without a CT the body is water.
        beamlet_mm: beamlet size at the isocentre.
        max_directions: arcs are sampled by at most so many directions.
        margin_mm: beamlets open up to this far outside the targets' projection.
    """

    def __init__(self, case: Case, beamlet_mm: float = 6.0, max_directions: int = 24, margin_mm: float = 6.0) -> None:
        self.case = case
        self.index = np.nonzero(case.body)
        self.directions = case_directions(case, beamlet_mm, max_directions, margin_mm)

    @cached_property
    def fields(self) -> list[Field]:
        """One dose operator a direction, for all body voxels in C order."""
        return [direction.field(self.index) for direction in self.directions]

    def volume(self, body_values: np.ndarray) -> np.ndarray:
        """Values of the body's voxels as an array on the case's grid."""
        out = np.zeros(self.case.grid.shape, dtype=np.float32)
        out[self.index] = body_values
        return out

    def plan(self, fluences: list[np.ndarray]) -> Plan:
        """The plan of one fluence a direction."""
        dose = sum(field.forward(fluence) for field, fluence in zip(self.fields, fluences, strict=True))
        return Plan(self.volume(dose), fluences, [d.u_mm for d in self.directions], [d.w_mm for d in self.directions],
                    [d.gantry_deg for d in self.directions])


def plan_dose(case: Case, objectives: Sequence[Objective] | None = None, *, beamlet_mm: float = 6.0,
              iterations: int = 40, normalise: bool = False, max_directions: int = 24, seed: int = 0,
              beams: BeamModel | None = None) -> Plan:
    """Plan the case on its own CT, structures and beams.

    Args:
        case: on an axis-aligned grid.
        objectives: rows; None reads ``configs/plan_objectives.json``.
        beamlet_mm, max_directions: see :class:`BeamModel`.
        iterations: of L-BFGS-B.
        normalise: scale so that the highest target's D95 is its prescription (synthetic patients); otherwise the
            optimiser's own trade-off stands (plan prior).
        seed: of the voxel sample the objectives are evaluated on.
        beams: the case's beam model where it is there already; its beamlet size then counts.
    """
    objectives = load_objectives() if objectives is None else objectives
    beams = beams or BeamModel(case, beamlet_mm, max_directions)
    regions = {name: mask[beams.index] for name, mask in _regions(case, objectives).items()}
    rng = np.random.default_rng(seed)
    chosen = np.zeros(beams.index[0].size, dtype=bool)
    for name, inside in regions.items():
        chosen |= inside & (rng.random(inside.size) < _sampled_share(name, int(inside.sum()), case))
    voxels = np.flatnonzero(chosen)
    regions = {name: inside[voxels] for name, inside in regions.items()}
    terms = _terms(case, objectives, regions)

    def loss(dose: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = 0.0, np.zeros_like(dose)
        for kind, rows, limit, weight in terms:
            excess = dose[rows] - limit
            excess = np.minimum(excess, 0.0) if kind == "min" else np.maximum(excess, 0.0)
            value += float(weight * np.dot(excess, excess))
            gradient[rows] += 2.0 * weight * excess
        return value, gradient

    main = next(iter(case.targets))
    start_on = np.flatnonzero(regions[main]), case.targets[main]
    plan = beams.plan(_optimise([f.at(voxels) for f in beams.fields], loss, iterations, start_on))
    if not normalise:
        return plan
    scale = case.targets[main] / max(float(np.percentile(plan.dose_gy[case.masks[main]], 5)), 1e-3)
    return replace(plan, dose_gy=plan.dose_gy * np.float32(scale), fluences=[f * scale for f in plan.fluences])


def case_directions(case: Case, beamlet_mm: float, max_directions: int, margin_mm: float = 6.0) -> list[Direction]:
    """The case's beams as engine directions; arcs are thinned to ``max_directions``. Without a CT the body is water."""
    density = density_from_hu(case.ct_hu) if case.ct_hu is not None else np.ones(case.grid.shape, np.float32)
    density = np.where(case.body, density, np.float32(0.0))
    angles = [(angle, beam.isocenter_mm) for beam in case.beams for angle in beam.gantry_deg]
    stride = max(1, -(-len(angles) // max_directions))
    target = case.target_mask()
    return [Direction(density, case.grid, angle, centre, target, beamlet_mm, margin_mm)
            for angle, centre in angles[::stride]]


def _regions(case: Case, objectives: Sequence[Objective]) -> dict[str, np.ndarray]:
    target = case.target_mask()
    tissue = case.body & ~target
    distance = _distance_to(target, case.grid.spacing_mm, reach_mm=34.0)
    regions = {roi: case.masks[roi] for roi in case.targets}
    named = dict.fromkeys(row.structure for row in objectives)  # in this order: the voxel sample is drawn by region
    regions |= {roi: case.masks[roi] & case.body for roi in named if roi in case.masks and roi != BODY}
    regions[RING] = tissue & (distance > 4.0) & (distance <= 30.0)
    regions[BODY] = tissue
    return {name: mask for name, mask in regions.items() if mask.any()}


def _distance_to(mask: np.ndarray, spacing_mm, reach_mm: float) -> np.ndarray:
    """Distance in mm to ``mask``, infinite beyond its bounding box grown by ``reach_mm``."""
    box = ndimage.find_objects(mask.astype(np.int8))[0]
    grown = tuple(slice(max(0, s.start - int(reach_mm / d) - 1), s.stop + int(reach_mm / d) + 1)
                  for s, d in zip(box, spacing_mm, strict=True))
    out = np.full(mask.shape, np.inf, dtype=np.float32)
    out[grown] = ndimage.distance_transform_edt(~mask[grown], sampling=spacing_mm)
    return out


def _sampled_share(name: str, voxels: int, case: Case) -> float:
    """Share of a region's voxels the objectives look at: most of a target, about 2000 voxels of an organ."""
    count = 6000 if name in case.prescription_gy else {BODY: 6000, RING: 5000}.get(name, 2000)
    return min(1.0, count / max(voxels, 1))


def _terms(case: Case, objectives: Sequence[Objective], regions) -> list[tuple]:
    """``(kind, positions in the voxel list, limit in Gy, weight per voxel)`` for each objective that applies."""
    highest = case.highest_prescription_gy
    levels = sorted(set(case.prescription_gy.values()), reverse=True)
    terms = []
    for row in objectives:
        names = list(case.targets) if row.structure == "Target" else [row.structure]
        for name in names:
            if name not in regions:
                continue
            own = case.prescription_gy.get(name, highest)
            if row.level is not None and own not in _at_level(row.level, levels):
                continue
            voxels = np.flatnonzero(regions[name])
            limit = row.dose_gy if row.dose_gy is not None else row.dose_share * own
            terms.append((row.kind, voxels, limit, row.weight / max(voxels.size, 1)))
    return terms


def _at_level(level: str, prescriptions: Sequence[float]) -> Sequence[float]:
    """Those of the prescriptions (descending, each once) that a level of ``LEVELS`` means."""
    if level == "high":
        return prescriptions[:1]
    if level == "mid":
        return prescriptions[1:2] if len(prescriptions) > 2 else ()
    return prescriptions[1:] if level == "lower" else prescriptions[1:][-1:]


def _optimise(fields: list[Field], loss, iterations: int, start_on) -> list[np.ndarray]:
    """Non-negative fluences that minimise ``loss(dose) -> (value, gradient)``, by L-BFGS-B from a uniform start.

    ``start_on`` is ``(voxels, mean dose in Gy)``: the uniform fluence begins at that mean over those voxels.
    """
    offsets = np.concatenate([[0], np.cumsum([f.active.sum() for f in fields])])

    def unpack(x: np.ndarray) -> list[np.ndarray]:
        fluences = [np.zeros(f.active.shape) for f in fields]
        for fluence, field, a, b in zip(fluences, fields, offsets[:-1], offsets[1:], strict=True):
            fluence[field.active] = x[a:b]
        return fluences

    def total(fluences) -> np.ndarray:
        return sum(field.forward(fluence) for field, fluence in zip(fields, fluences, strict=True))

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        fluences = unpack(x)
        value, gradient = loss(total(fluences))
        out = np.empty_like(x)
        for field, fluence, a, b in zip(fields, fluences, offsets[:-1], offsets[1:], strict=True):
            back = field.adjoint(gradient)
            rough, slope = _roughness(fluence)
            value, back = value + SMOOTHING * rough, back + SMOOTHING * slope
            out[a:b] = back[field.active]
        return value, out

    ones = np.ones(offsets[-1])
    voxels, level = start_on
    ones *= level / max(float(total(unpack(ones))[voxels].mean()), 1e-6)
    with threadpool_limits(1, user_api="blas"):  # small products, on which two threads take three times as long
        result = optimize.minimize(value_and_gradient, ones, jac=True, method="L-BFGS-B",
                                   bounds=[(0, None)] * ones.size,
                                   options={"maxiter": iterations, "maxcor": 8, "maxfun": 2 * iterations})
    return unpack(result.x)


def _roughness(fluence: np.ndarray) -> tuple[float, np.ndarray]:
    """Sum of squared differences of neighbouring beamlets, and its gradient."""
    value, gradient = 0.0, np.zeros_like(fluence)
    for axis in (0, 1):
        step = np.diff(fluence, axis=axis)
        value += float((step**2).sum())
        inner, outer = [slice(None)] * 2, [slice(None)] * 2
        inner[axis], outer[axis] = slice(1, None), slice(None, -1)
        gradient[tuple(inner)] += 2.0 * step
        gradient[tuple(outer)] -= 2.0 * step
    return value, gradient
