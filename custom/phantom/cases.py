"""From drawn anatomy to a :class:`~custom.case.Case`: CT texture, isocentre and beams."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from custom.case import BODY, Beam, Case, CaseError, Grid, Site, Technique
from custom.phantom import anatomy_head_neck, anatomy_lung
from custom.phantom.shapes import Anatomy

__all__ = ["make_case", "with_dose"]

ANATOMIES = {Site.HEAD_NECK: anatomy_head_neck, Site.LUNG: anatomy_lung}
DEFAULT_TECHNIQUE = {Site.HEAD_NECK: Technique.IMRT, Site.LUNG: Technique.VMAT}
PREFIX = {Site.HEAD_NECK: "hn", Site.LUNG: "lung"}
SPACING_MM = (4.0, 4.0, 5.0)
ARC_SECTORS = 24
HU_RANGE = (-1000, 3000)


def make_case(
    site: str,
    seed: int,
    *,
    shape: Sequence[int] | None = None,
    spacing_mm: Sequence[float] | None = None,
    technique: str | None = None,
    noise_hu: float = 12.0,
) -> Case:
    """Draw one synthetic patient with structures, prescription and beams, but without a dose.

    The anatomy depends on the seed alone; ``shape`` and ``spacing_mm`` only choose how it is sampled.

    Args:
        site: :class:`custom.case.Site`.
        seed: not negative.
        shape: voxels along ``(i, j, k)``; the field of view (about 51 x 51 x 30 cm) is kept unless ``spacing_mm``
            is given too.
        spacing_mm: voxel size along ``(i, j, k)``; (4, 4, 5) when neither is given.
        technique: :class:`custom.case.Technique`; by default IMRT (nine fields) for the head and neck and VMAT (one
            partial arc) for the lung. Lung IMRT has seven fields on the side of the tumour, head-and-neck VMAT one
            full arc.
        noise_hu: standard deviation of the CT noise inside the body.

    Raises:
        CaseError: for an unknown site or technique, or a grid too coarse to show every structure.
    """
    if site not in ANATOMIES:
        raise CaseError(f"phantom: site {site!r}; expected one of {sorted(ANATOMIES)}")
    technique = DEFAULT_TECHNIQUE[site] if technique is None else technique
    if technique not in (Technique.IMRT, Technique.VMAT):
        raise CaseError(f"phantom: technique {technique!r}; expected {Technique.IMRT!r} or {Technique.VMAT!r}")
    source = ANATOMIES[site]
    grid = _grid(source.EXTENT_MM, source.CENTRE_MM, shape, spacing_mm)
    anatomy_rng, texture_rng = (np.random.default_rng([seed, stream]) for stream in (0, 1))
    anatomy: Anatomy = source.draw(grid, anatomy_rng, texture_rng)
    empty = sorted(name for name, mask in anatomy.masks.items() if not mask.any())
    if empty:
        raise CaseError(
            f"phantom: {site} seed {seed} shows no {', '.join(empty)} on a grid of {grid.shape} voxels of "
            f"{np.round(grid.spacing_mm, 1)} mm; use a finer or larger grid"
        )
    target = np.logical_or.reduce([anatomy.masks[name] for name in anatomy.prescription_gy])
    isocenter = tuple(float(v) for v in np.rint(grid.to_world(ndimage.center_of_mass(target))))
    return Case(
        name=f"{PREFIX[site]}_{seed:04d}",
        grid=grid,
        ct_hu=_render(anatomy, texture_rng, noise_hu),
        masks=anatomy.masks,
        prescription_gy=anatomy.prescription_gy,
        beams=_beams(site, technique, anatomy.side, isocenter),
        technique=technique,
        site=site,
        source={
            "format": "phantom",
            "seed": int(seed),
            "fractions": anatomy.fractions,
            "notes": [f"Synthetic patient (seed {seed}, {anatomy.details}); not a person."],
        },
    )


def with_dose(case: Case, dose_gy: np.ndarray) -> Case:
    """The same case with a reference dose ``[i, j, k]`` in Gy on its own grid."""
    return dataclasses.replace(case, dose_gy=np.asarray(dose_gy, dtype=np.float32), dose_grid=case.grid)


def _grid(extent_mm, centre_mm, shape, spacing_mm) -> Grid:
    """The grid around the anatomy's centre; a missing shape or spacing follows from the field of view."""
    extent = np.asarray(extent_mm, dtype=np.float64)
    if spacing_mm is None:
        spacing = np.asarray(SPACING_MM) if shape is None else extent / np.asarray(shape)
    else:
        spacing = np.asarray(spacing_mm, dtype=np.float64)
    spacing = np.round(spacing, 4)
    if spacing.shape != (3,) or not (spacing > 0).all():
        raise CaseError(f"phantom: spacing {spacing} mm; expected three positive numbers")
    shape = np.rint(extent / spacing).astype(int) if shape is None else np.asarray(shape)
    origin = np.round(np.asarray(centre_mm) - spacing * (shape - 1) / 2, 3)
    return Grid.axis_aligned(shape, spacing, origin)


def _render(anatomy: Anatomy, texture: np.random.Generator, noise_hu: float) -> np.ndarray:
    """Partial-volume blur and correlated noise; float32 with whole HU, as a scanner stores."""
    hu = ndimage.gaussian_filter(anatomy.hu, (0.5, 0.5, 0.35))
    if noise_hu:
        noise = ndimage.gaussian_filter(texture.standard_normal(hu.shape).astype(np.float32), (0.6, 0.6, 0))
        hu = hu + noise * (noise_hu / noise.std()) * np.where(anatomy.masks[BODY], np.float32(1.0), np.float32(0.4))
    return np.clip(np.rint(hu), *HU_RANGE).astype(np.float32)


def _beams(site: str, technique: str, side: int, isocenter: tuple[float, float, float]) -> tuple[Beam, ...]:
    """Nine equispaced fields or a full arc (head and neck); seven fields or an arc on the tumour's side (lung)."""
    if technique == Technique.VMAT:
        start, stop = (-179.0, 179.0) if site == Site.HEAD_NECK else (-20.0, 180.0) if side > 0 else (180.0, 380.0)
        half = (stop - start) / ARC_SECTORS / 2
        angles = np.linspace(start + half, stop - half, ARC_SECTORS)  # the middle of each sector
        return (Beam("ARC1", tuple(round(float(a) % 360, 2) for a in angles), isocenter),)
    angles = np.arange(0, 360, 40.0) if site == Site.HEAD_NECK else side * np.linspace(-20, 180, 7).round()
    return tuple(Beam(f"G{a % 360:03.0f}", (float(a % 360),), isocenter) for a in angles)
