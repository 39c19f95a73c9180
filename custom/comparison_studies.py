"""What a study of one sampled system says: scores against sampling steps, and how far the seed moves them."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import numpy as np

from custom.case import CaseError
from custom.comparison_figures import draw_steps
from custom.whole import write_json

__all__ = ["SEED_COLUMNS", "SeedSpread", "StepCurve"]

logger = logging.getLogger(__name__)

# DoseDiff's table VI, in its order, and OpenKBP's score.
SEED_COLUMNS = ("mae_body_gy", "ssim", "psnr_db", "dosediff_dose_score_gy", "dosediff_volume_score_percent",
                "openkbp_dose_error_gy")


class StepCurve:
    """Run a study whose ways are called ``"8 steps"`` and so on, and draw its scores against the steps.

    Args:
        study: :class:`custom.studies.PredictionStudy`.
        output_dir: gets ``steps.png``, beside the study's own table.
    """

    def __init__(self, study: Any, output_dir: str | Path) -> None:
        self.study, self.path = study, Path(output_dir) / "steps.png"

    def run(self) -> dict[int, dict]:
        """Do the study and draw; returns steps -> scores."""
        summaries = self.study.run()
        try:
            steps = {int(way.split()[0]): scores for way, scores in summaries.items()}
        except ValueError as error:
            raise CaseError(f"step curve: ways {list(summaries)}; expected names such as '8 steps'") from error
        draw_steps(steps, self.path)
        return steps


class SeedSpread:
    """Run a study whose ways differ in the seed only, and say how much the mean scores vary (DoseDiff, table VI).

    Args:
        study: :class:`custom.studies.PredictionStudy`.
        output_dir: where the study writes ``<name>.csv``; gets ``seed_spread.json``.
        name: of the study.
    """

    def __init__(self, study: Any, output_dir: str | Path, name: str = "seeds") -> None:
        self.study, self.folder, self.name = study, Path(output_dir), name

    def run(self) -> dict[str, dict[str, float]]:
        """Do the study; returns and writes score -> mean, variance, std, min and max over the seeds."""
        self.study.run()
        with (self.folder / f"{self.name}.csv").open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        ways = list(dict.fromkeys(row["way"] for row in rows))
        if len(ways) < 2:
            raise CaseError(f"seed study: found {len(ways)} seed; expected two or more")
        spread = {}
        for column in SEED_COLUMNS:
            means = np.array([_mean(row[column] for row in rows if row["way"] == way) for way in ways])
            spread[column] = {"mean": float(means.mean()), "variance": float(means.var(ddof=1)),
                              "std": float(means.std(ddof=1)), "min": float(means.min()), "max": float(means.max())}
            logger.info("%-32s mean %.4f, variance over %d seeds %.2g", column, means.mean(), len(ways),
                        spread[column]["variance"])
        write_json(self.folder / "seed_spread.json", {"seeds": len(ways), "scores": spread})
        return spread


def _mean(texts) -> float:
    values = [float(text) for text in texts if text not in ("", "nan")]
    return float(np.mean(values)) if values else float("nan")
