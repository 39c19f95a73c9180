"""Command line: a case's predicted dose and its DVH: ``picture.py CASE RESULTS PICTURE``, as the README shows it.

``CASE`` is the folder the dose was predicted for, ``RESULTS`` the folder with its ``dose.nii.gz``. With ``--worst 3``
both hold many cases, as ``run evaluate`` reads and leaves them, and the picture shows the three predictions farthest
from their reference, without the CT.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from scipy import ndimage

from custom.case import BODY, Case, CaseError
from custom.io import find_cases, read_case
from custom.io.course import case_name
from custom.report import BANNER, make_report
from custom.report_pictures import ISODOSE_LINES, draw_views

VIEW = "Centre of the high-dose target"
SIZE_IN, DPI = (11.0, 7.4), 110
MOST_CURVES, COLOURS = 9, 200
SPOT_MM = 15.0
SUMMARY_ROWS = ("mean", "std")


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the picture the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0].split(": ", 1)[1])
    parser.add_argument("case", type=Path, help="one case, as the bundle reads it; with --worst a folder of cases")
    parser.add_argument("results", type=Path, help="folder with its dose.nii.gz; with --worst that of `run evaluate`")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--worst", type=int, metavar="N", help="draw the N cases with the largest dose error")
    options = parser.parse_args(arguments)
    if options.worst is None:
        picture = draw(read_case(options.case), _dose(options.results))
    else:
        ranked = ranking(options.results / "metrics.csv")
        paths = {case_name(path): path for path in find_cases(options.case)}
        missing = [name for name in ranked[: options.worst] if name not in paths]
        if missing:
            raise CaseError(f"{options.case}: no cases {missing}, which {options.results} scores; give the folder that "
                            "`run evaluate` read")
        cases = {name: read_case(paths[name]) for name in ranked[: options.worst]}
        note = f"The {len(cases)} of {len(ranked)} cases with the largest dose error"
        picture = draw_worst([(case, _dose(options.results / name)) for name, case in cases.items()], note)
    picture.save(options.picture, optimize=True)


def _dose(folder: Path) -> np.ndarray:
    return np.asarray(nib.load(folder / "dose.nii.gz").dataobj, dtype=np.float32)


def ranking(path: Path) -> list[str]:
    """Names of the cases of a ``metrics.csv``, the largest dose error first.

    Raises:
        CaseError: no such file, or none of ``run evaluate``.
    """
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            errors = {row["case"]: float(row["openkbp_dose_error_gy"]) for row in csv.DictReader(stream)
                      if row["case"] not in SUMMARY_ROWS}
    except (OSError, KeyError, ValueError) as error:
        raise CaseError(f"{path}: {error!r}; expected the metrics.csv that `run evaluate` leaves") from error
    return sorted(errors, key=errors.__getitem__, reverse=True)


def draw(case: Case, dose_gy: np.ndarray) -> Image.Image:
    """Three planes through the target with isodoses, and below them the DVH; the reference dashed."""
    record = make_report(case, dose_gy)
    views = [view for view in record["views"] if view["title"] == VIEW] or record["views"]
    outlined = {roi: record["colours"][roi] for roi in case.prescription_gy}
    (planes, *_) = draw_views(views[:1], case, dose_gy, outlined)[0]["rows"]
    pictures = {name: Image.open(io.BytesIO(base64.b64decode(png))) for name, png in planes["planes"].items()}
    figure = Figure(figsize=SIZE_IN, dpi=DPI, layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.05, 1.0))
    widths = [picture.width / picture.height for picture in pictures.values()]  # so that all are of one height
    for axes, (name, picture) in zip(upper.subplots(1, len(pictures), width_ratios=widths), pictures.items()):
        axes.imshow(picture, interpolation="lanczos")
        axes.set_axis_off()
        axes.set_title(f"predicted dose, {name}", fontsize=10)
    keys = [Line2D([], [], color=colour, label=f"{share:.0%}") for share, colour in ISODOSE_LINES.items()]
    upper.legend(handles=keys, title=f"of {case.highest_prescription_gy:g} Gy", loc="outside right center",
                 fontsize=8, title_fontsize=8, handlelength=1.4)
    _draw_dvh(lower.subplots(), record)
    return _rendered(figure, f"{case.name}. {BANNER}")


def draw_worst(predictions: Sequence[tuple[Case, np.ndarray]], note: str) -> Image.Image:
    """A row a case: the axial plane of its largest error, predicted, reference and difference; and its DVH."""
    figure = Figure(figsize=(SIZE_IN[0] * 1.5, 3.6 * len(predictions)), dpi=DPI, layout="constrained")
    for part, (case, dose_gy) in zip(np.atleast_1d(figure.subfigures(len(predictions), 1)), predictions):
        record = make_report(case, dose_gy)
        spot = largest_error(case, dose_gy)
        error_gy = dose_gy[spot] - case.dose_gy[spot]
        view = {"title": "", "index": list(spot), "dose_gy": float(dose_gy[spot])}
        outlined = {roi: record["colours"][roi] for roi in case.prescription_gy}
        rows = draw_views([view], replace(case, ct_hu=None), dose_gy, outlined)[0]["rows"]
        *planes, histogram = part.subplots(1, len(rows) + 1, width_ratios=[1.0] * len(rows) + [1.5])
        for axes, row in zip(planes, rows):
            axes.imshow(Image.open(io.BytesIO(base64.b64decode(row["planes"]["axial"]))), interpolation="lanczos")
            axes.set_axis_off()
            axes.set_title(row["title"], fontsize=10)
        mean_gy = float(np.abs(dose_gy - case.dose_gy)[case.body].mean())
        part.suptitle(f"{case.name}: {mean_gy:.1f} Gy in the mean of the body, {error_gy:+.0f} Gy where it is worst",
                      fontsize=11)
        _draw_dvh(histogram, record)
    colours = "Difference: red where the prediction is too hot, blue where too cold, full from 10 % of the prescription"
    return _rendered(figure, f"{note}. {colours}. {BANNER}").quantize(COLOURS)


def largest_error(case: Case, dose_gy: np.ndarray) -> tuple[int, int, int]:
    """Voxel of the body around which the dose is farthest from the reference, in the mean of a cube of ``SPOT_MM``.

    Raises:
        CaseError: the case has no reference dose.
    """
    if case.dose_gy is None:
        raise CaseError(f"{case.name}: no reference dose; expected one to compare the prediction with")
    voxels = np.maximum(np.rint(SPOT_MM / case.grid.spacing_mm), 1).astype(int)
    error = ndimage.uniform_filter(np.abs(dose_gy - case.dose_gy) * case.body, voxels)
    return tuple(int(n) for n in np.unravel_index(np.where(case.body, error, -1.0).argmax(), error.shape))


def _rendered(figure: Figure, foot: str) -> Image.Image:
    figure.supxlabel(foot, fontsize=8, color="#555555")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _draw_dvh(axes: Any, record: Mapping[str, Any]) -> None:
    """Curves of the targets and of the organs with the highest mean dose."""
    doses, curves = record["dvh"]["dose_gy"], record["dvh"]["volume_percent"]
    targets = [roi for roi in record["prescription_gy"] if roi in curves]
    organs = sorted((roi for roi in curves if roi not in targets and roi != BODY),
                    key=lambda roi: -float(np.sum(curves[roi]["predicted"])))
    for roi in [*targets, *organs][:MOST_CURVES]:
        axes.plot(doses, curves[roi]["predicted"], color=record["colours"][roi], linewidth=1.6, label=roi)
        if "reference" in curves[roi]:
            axes.plot(doses, curves[roi]["reference"], color=record["colours"][roi], linewidth=1.1, linestyle="--")
    axes.set(xlabel="dose in Gy", ylabel="volume in %", xlim=(0, doses[-1]), ylim=(0, 101))
    axes.set_title("dose-volume histogram: predicted (solid) and reference (dashed)", fontsize=10)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


if __name__ == "__main__":
    main()
