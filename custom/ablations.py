"""Train the same thing several times with one part left out, each in a process of its own, and make one table."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from custom.case import CaseError
from custom.whole import write_json, write_whole

__all__ = ["Ablations", "table"]

logger = logging.getLogger(__name__)

OVERLAYS = "overlays"


class Ablations:
    """Run ``ablate`` of the configs once a variant and collect the scores.

    Args:
        variants: name -> config overrides; the first one is what the others are compared with. ``overlays`` among them
            names further config files, laid over the others.
        config_files: of the runs.
        options: overrides for all of them, such as the data set and the minutes.
        output_dir: gets a folder a variant, ``ablations.json`` and ``ablations.md``.
        run_id: what to run.
        names: of the variants to run; None for all. The first of ``variants`` is always the one compared with.

    Raises:
        CaseError: a name that is none of the variants.
    """

    def __init__(self, variants: Mapping[str, Mapping[str, Any]], config_files: Sequence[str | Path],
                 options: Mapping[str, Any], output_dir: str | Path, run_id: str = "ablate",
                 names: Sequence[str] | None = None) -> None:
        if unknown := sorted(set(names or ()) - set(variants)):
            raise CaseError(f"ablations: no variant {', '.join(unknown)}; expected some of {', '.join(variants)}")
        wanted = set(variants) if names is None else {next(iter(variants)), *names}
        self.variants = {name: overrides for name, overrides in variants.items() if name in wanted}
        self.options, self.run_id = dict(options), run_id
        self.config_files, self.output_dir = [str(path) for path in config_files], Path(output_dir)

    def run(self) -> dict[str, dict]:
        """Train and score what is not done yet; returns and writes variant -> scores.

        Raises:
            CaseError: a run failed; names it and its log.
        """
        found = {}
        for name, overrides in self.variants.items():
            folder = self.output_dir / re.sub(r"\W+", "_", name)
            scores = folder / "scores.json"
            if not scores.is_file():
                logger.info("%s: training", name)
                self._run(name, folder, overrides)
            found[name] = json.loads(scores.read_text())
            self._write(found)
        return found

    def _run(self, name: str, folder: Path, overrides: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        values = {**self.options, "output_dir": str(folder), **overrides}
        files = self.config_files + [str(path) for path in values.pop(OVERLAYS, ())]
        command = [sys.executable, "-m", "monai.bundle", "run", self.run_id, "--config_file", str(files)]
        for key, value in values.items():
            command += [f"--{key}", "$None" if value is None else value if isinstance(value, str) else repr(value)]
        log = folder / "log.txt"
        with log.open("w") as stream:
            code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
        if code or not (folder / "scores.json").is_file():
            raise CaseError(f"ablation {name!r} ended with exit code {code}; read {log}, and run again to go on")

    def _write(self, found: Mapping[str, Mapping]) -> None:
        write_json(self.output_dir / "ablations.json", found)
        write_whole(self.output_dir / "ablations.md", table(found))
        logger.info("\n%s", table(found))


def table(found: Mapping[str, Mapping[str, Mapping]]) -> str:
    """Markdown table of variant -> inferer -> scores, with the paired differences to the first variant.

    The 95 % interval is that of the mean paired difference over cases (Student's t). Where limits were judged, their
    columns follow, beside those that the reference doses meet.
    """
    first = next(iter(found.values()))
    judged = any("constraints_met_percents" in scores for inferers in found.values() for scores in inferers.values())
    titles = ["variant", "inferer", "dose score, Gy", "DVH score, Gy", "difference of dose score [95 %]"]
    titles += ["limits met, %", "reference, %", "difference of limits met [95 %]"] if judged else []
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for variant, inferers in found.items():
        for inferer, scores in inferers.items():
            other = first[inferer]
            cells = [variant, inferer, f"{scores['dose_score']:.3f}", f"{scores['dvh_score']:.3f}",
                     _difference(scores, other, "dose_errors_gy", 3)]
            if "constraints_met_percents" in scores:
                met = np.array([scores["constraints_met_percent"], scores["reference_constraints_met_percent"]], float)
                cells += [f"{percent:.1f}" for percent in met]  # nan where JSON has null
                cells.append(_difference(scores, other, "constraints_met_percents", 1))
            cells += [""] * (len(titles) - len(cells))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _difference(scores: Mapping, first: Mapping, key: str, digits: int) -> str:
    """Mean paired difference over the cases that both have a number of, with its interval; nothing for the first."""
    if scores is first or key not in first:
        return ""
    difference = np.array(scores[key], dtype=float) - np.array(first[key], dtype=float)  # nan where JSON has null
    difference = difference[np.isfinite(difference)]
    if difference.size < 2:
        return ""
    half = stats.t.ppf(0.975, difference.size - 1) * difference.std(ddof=1) / np.sqrt(difference.size)
    mean = difference.mean()
    return f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"
