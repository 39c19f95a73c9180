"""Command line: the README's picture, a case's predicted dose and its DVH: ``picture.py CASE RESULTS PICTURE``.

``CASE`` is the folder the dose was predicted for, ``RESULTS`` the folder with its ``dose.nii.gz``.
"""

from __future__ import annotations

import argparse
import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from custom.case import BODY, Case
from custom.io import read_case
from custom.report import BANNER, make_report
from custom.report_pictures import ISODOSE_LINES, draw_views

VIEW = "Centre of the high-dose target"
SIZE_IN, DPI = (11.0, 7.4), 110
MOST_CURVES = 9


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the picture the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0].split(": ", 1)[1])
    parser.add_argument("case", type=Path, help="one case, as the bundle reads it")
    parser.add_argument("results", type=Path, help="folder with its dose.nii.gz")
    parser.add_argument("picture", type=Path, help="PNG to write")
    options = parser.parse_args(arguments)
    case = read_case(options.case)
    dose_gy = np.asarray(nib.load(options.results / "dose.nii.gz").dataobj, dtype=np.float32)
    draw(case, dose_gy).save(options.picture, optimize=True)


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
    figure.supxlabel(f"{case.name}: a synthetic patient. {BANNER}", fontsize=8, color="#555555")
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
