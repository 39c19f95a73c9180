"""Figures of a comparison: doses and differences side by side, DVHs, and scores against sampling steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from custom.case import Case
from custom.dosimetry.dvh import cumulative_dvh

__all__ = ["draw_doses", "draw_dvhs", "draw_steps"]

DIFFERENCE_GY = 10.0
COLOURS = colormaps["tab20"].colors[::2] + colormaps["tab20"].colors[1::2]
BORDER_VOXELS = 3


def middle_slice(case: Case) -> int:
    """Axial index of the centre of mass of the highest target, where most is to be seen."""
    top = case.highest_prescription_gy
    target = np.logical_or.reduce([case.masks[roi] for roi, gy in case.prescription_gy.items() if gy == top])
    where = np.nonzero((target if target.any() else case.body).any(axis=(0, 1)))[0]
    return int(round(where.mean()))


def draw_doses(case: Case, doses_gy: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Axial slices: CT with the reference dose and every system's, and below them the differences to the reference.

    Args:
        case: the patient, with a reference dose.
        doses_gy: system -> dose ``[i, j, k]`` on the case's grid.
        path: PNG.
    """
    k = middle_slice(case)
    names = ["reference", *doses_gy]
    volumes = [case.dose_gy, *doses_gy.values()]
    figure = Figure(figsize=(3 * len(names), 6.4), layout="constrained")
    axes = figure.subplots(2, len(names), squeeze=False)
    aspect = case.grid.spacing_mm[1] / case.grid.spacing_mm[0]
    inside = case.body[:, :, k].T
    for column, (name, volume) in enumerate(zip(names, volumes)):
        plane = np.asarray(volume)[:, :, k].T
        shown = axes[0, column].imshow(np.where(inside, plane, np.nan), cmap="jet", vmin=0, aspect=aspect,
                                       vmax=1.1 * case.highest_prescription_gy)
        axes[0, column].set_title(name)
        error = plane - case.dose_gy[:, :, k].T
        if column:
            moved = axes[1, column].imshow(np.where(inside, error, np.nan), cmap="RdBu_r", vmin=-DIFFERENCE_GY,
                                           vmax=DIFFERENCE_GY, aspect=aspect)
            axes[1, column].set_title(f"MAE {np.abs(error)[inside].mean():.2f} Gy in this slice", fontsize=9)
        for row in range(2):
            _outline(axes[row, column], case, k)
    if case.ct_hu is not None:
        axes[1, 0].imshow(case.ct_hu[:, :, k].T, cmap="gray", vmin=-200, vmax=300, aspect=aspect)
        axes[1, 0].set_title("CT")
    rows, columns = (np.nonzero(inside.any(axis=axis))[0] for axis in (1, 0))
    for axis in axes.flat:
        axis.set_axis_off()
        axis.set_xlim(columns[0] - BORDER_VOXELS, columns[-1] + BORDER_VOXELS)
        axis.set_ylim(rows[-1] + BORDER_VOXELS, rows[0] - BORDER_VOXELS)
    figure.colorbar(shown, ax=axes[0], label="dose, Gy", shrink=0.8)
    if doses_gy:
        figure.colorbar(moved, ax=axes[1], label="difference to the reference, Gy", shrink=0.8)
    figure.suptitle(f"{case.name}, axial slice {k}; black: targets")
    _save(figure, path)


def _outline(axis, case: Case, k: int) -> None:
    for roi in case.prescription_gy:
        plane = case.masks[roi][:, :, k].T
        if plane.any() and not plane.all():
            axis.contour(plane, levels=[0.5], colors="black", linewidths=0.7)


def draw_dvhs(case: Case, doses_gy: Mapping[str, np.ndarray], path: str | Path) -> None:
    """DVHs of targets and organs, a panel a system; dashed: the reference.

    Args:
        case, doses_gy, path: see :func:`draw_doses`.
    """
    organs = [roi for roi in ("SpinalCord", "Brainstem", "Parotid_L", "Parotid_R", "Esophagus", "Larynx", "Heart",
                              "Lungs") if roi in case.masks]
    shown = [roi for roi in (*case.targets, *organs) if case.masks[roi].any()]
    figure = Figure(figsize=(3.6 * len(doses_gy) + 1.4, 4), layout="constrained")
    axes = figure.subplots(1, len(doses_gy), squeeze=False, sharey=True)[0]
    for axis, (name, dose) in zip(axes, doses_gy.items()):
        for n, roi in enumerate(shown):
            for volume, style in ((case.dose_gy, "--"), (dose, "-")):
                dvh = cumulative_dvh(np.asarray(volume), case.masks[roi], case.grid.voxel_cc)
                axis.plot(dvh.dose_gy, dvh.volume_percent, style, color=COLOURS[n % len(COLOURS)], linewidth=1.2,
                          label=roi if style == "-" else None)
        axis.set(title=name, xlabel="dose, Gy", xlim=(0, 1.15 * case.highest_prescription_gy), ylim=(0, 101))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("volume, %")
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(f"{case.name}; dashed: reference dose")
    _save(figure, path)


def draw_steps(steps: Mapping[int, Mapping[str, float]], path: str | Path) -> None:
    """Scores and seconds against the number of sampling steps, as Fig. 4 of DoseDiff.

    Args:
        steps: number of steps -> ``dose_score``, ``dvh_score``, ``psnr_db``, ``ssim`` and ``seconds``.
        path: PNG.
    """
    panels = {"dose_score": "dose score, Gy", "dvh_score": "DVH score, Gy", "psnr_db": "PSNR, dB", "ssim": "SSIM",
              "seconds": "seconds a case"}
    counts = sorted(steps)
    figure = Figure(figsize=(3 * len(panels), 3), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(1, len(panels)), panels.items()):
        axis.plot(counts, [steps[count][name] for count in counts], "o-", markersize=3)
        axis.set(xlabel="DDIM steps", title=title, xscale="log", xticks=counts)
        axis.set_xticklabels([str(count) for count in counts], fontsize=7)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
