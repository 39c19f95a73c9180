"""One network, many ways to run it: steps and samples, missing inputs, and what its uncertainty is worth.

Each study prepares a case once, predicts it in every way that was asked for, scores each prediction against the
reference dose and writes one table; ``bundle/configs/studies.json`` wires them.
"""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from custom.case import BODY, Case, CaseError, DoseScale, Keys
from custom.dosimetry.constraints import load_constraints
from custom.dosimetry.dvh import parse_metric
from custom.dosimetry.image_quality import fine_structure_ratio, psnr_db, ssim
from custom.dosimetry.regions import regions
from custom.metrics import case_metrics, openkbp_dvh, summarise
from custom.precision import wait_for
from custom.whole import whole_file, write_json

__all__ = [
    "CachedScore",
    "Calibration",
    "CalibrationStudy",
    "PredictionStudy",
    "coverage",
    "fit_calibration",
    "without",
]

logger = logging.getLogger(__name__)

WORK = "work"
LEVELS = (0.5, 0.8, 0.95)
COLUMNS = ("dose_score", "dvh_score", "psnr_db", "ssim", "fine_structure_ratio", "constraints_met_percent",
           "reference_constraints_met_percent", "seconds")


def without(case: Case, names: Sequence[str]) -> Case:
    """The case as if some inputs had not come along: ``"CT"``, or structures by their TG-263 names.

    Raises:
        CaseError: a name that is a target or the body, without which nothing is predicted.
    """
    needed = [name for name in names if name in case.prescription_gy or name == BODY]
    if needed:
        raise CaseError(f"study: cannot leave out {needed}; expected CT or organs at risk")
    masks = {roi: mask for roi, mask in case.masks.items() if roi not in names}
    return replace(case, masks=masks, ct_hu=None if "CT" in names else case.ct_hu)


class PredictionStudy:
    """Predict every case of a data set in several ways and compare the scores.

    Args:
        dataset: items with ``case`` and ``work`` (:class:`custom.case.Case`), a reference dose among them.
        condition: transform from ``work`` to ``image``, applied anew for every set of inputs left out.
        network: with its weights.
        ways: name -> ``{"inferer": ..., "without": [...], "condition": ...}``; the last two are empty and ``condition``
            by default.
        restore: transform from ``pred`` to Gy on the case's own grid.
        output_dir: gets ``<name>.csv``, a line a case and way, and ``<name>.json``, a summary a way.
        name: of the study.
        device: where the network is.
        constraints: the protocol whose compliance is measured; None takes the bundle's.
        measured: further figures of the predicted dose, each a structure and a metric, as ``"SpinalCord Max[Gy]"``.
    """

    def __init__(self, dataset: Sequence[Mapping], condition: Callable, network: torch.nn.Module,
                 ways: Mapping[str, Mapping], restore: Callable, output_dir: str | Path, name: str = "study",
                 device: torch.device | str = "cpu", constraints: str | Path | None = None,
                 measured: Sequence[str] = ()) -> None:
        self.constraints, self.measured = load_constraints(constraints), tuple(measured)
        self.dataset, self.condition, self.network, self.ways = dataset, condition, network, dict(ways)
        self.restore, self.path, self.device = restore, Path(output_dir) / name, torch.device(device)

    def run(self) -> dict[str, dict]:
        """Do the study; returns and writes way -> summary of its scores."""
        self.network.eval()
        rows = []
        for number in tqdm(range(len(self.dataset)), desc=self.path.name, unit="case"):
            rows += self._case(self.dataset[number])
        summaries = {}
        for way in self.ways:
            own = [row for row in rows if row["way"] == way]
            if not own:  # nothing of what it leaves out was in any case
                summaries[way] = {"cases": 0}
                continue
            pooled = summarise(own)
            summaries[way] = {"cases": len(own), "dose_score": pooled["dose_score"], "dvh_score": pooled["dvh_score"]}
            summaries[way] |= {name: pooled["metrics"][name]["mean"] for name in (*COLUMNS[2:], *self.measured)}
        self._write(rows, summaries)
        return summaries

    def _case(self, item: Mapping) -> Iterator[dict]:
        case: Case = item[Keys.CASE]
        images: dict[tuple, Mapping] = {}
        for way, how in self.ways.items():
            left_out = tuple(how.get("without", ()))
            if left_out and not any(n in case.masks or (n == "CT" and case.ct_hu is not None) for n in left_out):
                continue
            condition = how.get("condition", self.condition)
            inputs = left_out, id(condition)
            if inputs not in images:
                images[inputs] = condition({**item, WORK: without(item[WORK], left_out)})
            data = images[inputs]
            image = data[Keys.IMAGE][None].to(self.device)
            wait_for(self.device)
            start = time.perf_counter()
            with torch.no_grad():
                dose = how["inferer"](image, self.network)
            wait_for(self.device)
            seconds = time.perf_counter() - start
            dose_gy = self.restore({**data, Keys.PRED: dose[0]})[Keys.PRED][0].numpy()
            yield {"case": case.name, "way": way, "has_ct": int(case.ct_hu is not None and "CT" not in left_out),
                   **case_metrics(case, dose_gy, self.constraints), **_looks(case, dose_gy),
                   **self._figures(case, dose_gy), "seconds": seconds}

    def _figures(self, case: Case, dose_gy: np.ndarray) -> dict[str, float]:
        """The figures of :attr:`measured`; nan for a structure that is not there."""
        row = {}
        for text in self.measured:
            structure, metric = text.rsplit(" ", 1)
            found = regions(structure, case)[:1]
            values = [parse_metric(metric).evaluate(r.values(dose_gy), case.grid.voxel_cc, r.prescription_gy) for r in
                      found]
            row[text] = values[0] if values else float("nan")
        return row

    def _write(self, rows: Sequence[Mapping], summaries: Mapping[str, Mapping]) -> None:
        names = list(dict.fromkeys(name for row in rows for name in row))
        with whole_file(self.path.with_suffix(".csv")) as part, part.open("w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, names, restval="")
            table.writeheader()
            table.writerows(rows)
        write_json(self.path.with_suffix(".json"), summaries)
        for way, summary in summaries.items():
            logger.info("%-24s %s", way, "  ".join(f"{name} {summary[name]:.4g}" for name in
                                                   (*COLUMNS, *self.measured) if name in summary))


def _looks(case: Case, dose_gy: np.ndarray) -> dict[str, float]:
    reference = np.asarray(case.dose_gy, dtype=np.float32)
    range_gy = case.highest_prescription_gy
    return {"psnr_db": psnr_db(dose_gy, reference, case.body, range_gy),
            "ssim": ssim(dose_gy, reference, case.body, range_gy),
            "fine_structure_ratio": fine_structure_ratio(dose_gy, reference, case.body, case.grid.spacing_mm)}


class CachedScore:
    """Dose and DVH score of a network on a training's cached validation tensors, without preparing the cases anew.

    The scores are those of the working grid; where that is the case's own, as in OpenKBP, they are the scores.

    Args:
        dataset: items with ``image``, ``label`` (``(1 or 2, X, Y, Z)``, fraction of the prescription first), ``body``,
            ``rois``, ``prescription_gy`` and ``voxel_cc``.
        network: with its weights.
        inferers: name -> inferer.
        roi_names: names of the channels of ``rois``.
        target_names: which of them are targets.
        output_dir: gets ``scores.json``.
        device: where the network is.
        compliance: metric ``(dose (B, 1, X, Y, Z), image) -> percent (B, 1)`` of the limits met, which the reference
            doses are put to as well, such as :class:`custom.protocol.compliance.ComplianceScore`; None leaves it out.
        judged: the same cases whose ``image`` holds every condition the metric reads, for a dataset that has lost
            some; None takes ``dataset``.
    """

    def __init__(self, dataset: Sequence[Mapping], network: torch.nn.Module, inferers: Mapping[str, Callable],
                 roi_names: Sequence[str], target_names: Sequence[str], output_dir: str | Path,
                 device: torch.device | str = "cpu", compliance: Callable | None = None,
                 judged: Sequence[Mapping] | None = None) -> None:
        self.compliance, self.judged = compliance, dataset if judged is None else judged
        self.dataset, self.network, self.inferers = dataset, network, dict(inferers)
        self.is_target = [name in target_names for name in roi_names]
        self.path, self.device = Path(output_dir) / "scores.json", torch.device(device)

    def run(self) -> dict[str, dict]:
        """Score all cases; returns and writes inferer -> scores.

        Those are ``dose_score``, ``dvh_score`` (Gy) and ``dose_errors_gy`` by case; with a metric of compliance, the
        means ``constraints_met_percent`` and ``reference_constraints_met_percent`` and the former by case,
        ``constraints_met_percents`` (nan where no limit applies).
        """
        self.network.eval()
        found: dict[str, dict[str, list[float]]] = {name: {} for name in self.inferers}
        for number in tqdm(range(len(self.dataset)), desc="scores", unit="case"):
            for name, scores in self._case(number):
                for key, values in scores.items():
                    found[name].setdefault(key, []).extend(values)
        summary = {name: _summary(scores) for name, scores in found.items()}
        write_json(self.path, summary)
        return summary

    def _case(self, number: int) -> Iterator[tuple[str, dict[str, Sequence[float]]]]:
        item = self.dataset[number]
        body, label = item["body"][0] > 0, item["label"][0].float()
        gy = float(item["prescription_gy"])
        image = self.judged[number]["image"] if self.compliance is not None else item["image"]
        reference = self._percent(label, image)
        for name, inferer in self.inferers.items():
            with torch.no_grad():
                pred = inferer(item["image"][None].to(self.device), self.network)[0, 0].cpu() * body
            yield name, {"dose": [float((pred - label).abs()[body].mean()) * gy],
                         "dvh": list(self._dvh_errors(pred.numpy() * gy, label.numpy() * gy, item)),
                         "met": self._percent(pred, image), "reference_met": reference}

    def _percent(self, dose: torch.Tensor, image: torch.Tensor) -> list[float]:
        """Share of the limits met by ``(X, Y, Z)``, of one case; nothing without a metric."""
        return [] if self.compliance is None else [float(self.compliance(dose[None, None], image[None]))]

    def _dvh_errors(self, pred_gy: np.ndarray, label_gy: np.ndarray, item: Mapping) -> Iterator[float]:
        for mask, is_target in zip(item["rois"].numpy() > 0, self.is_target, strict=True):
            if mask.any():
                a, b = (openkbp_dvh(d[mask], 1000 * float(item["voxel_cc"]), is_target) for d in (pred_gy, label_gy))
                yield from (abs(a[name] - b[name]) for name in a)


def _summary(scores: Mapping[str, Sequence[float]]) -> dict:
    """Means over cases (dose, compliance) and over all structures of all cases (DVH)."""
    out = {"dose_score": float(np.mean(scores["dose"])), "dvh_score": float(np.mean(scores["dvh"])),
           "cases": len(scores["dose"]), "dose_errors_gy": scores["dose"]}
    if scores["met"]:
        out |= {"constraints_met_percent": float(np.nanmean(scores["met"])),
                "reference_constraints_met_percent": float(np.nanmean(scores["reference_met"])),
                "constraints_met_percents": scores["met"]}
    return out


class Calibration:
    """From the samples' spread to an error bar: ``scale * sqrt(std^2 + floor^2)``, and a factor for each level.

    Args:
        scale: so that the error bar is the root of the median squared error over 0.6745, a standard deviation where
            errors are normal.
        floor_gy: what the samples do not know of.
        factors: level -> half-width of its interval in error bars.
    """

    def __init__(self, scale: float, floor_gy: float, factors: Mapping[float, float]) -> None:
        self.scale, self.floor_gy, self.factors = scale, floor_gy, dict(factors)

    def bar_gy(self, std_gy: np.ndarray) -> np.ndarray:
        """Calibrated standard deviation in Gy."""
        return self.scale * np.sqrt(np.square(std_gy) + self.floor_gy**2)


def fit_calibration(error_gy: np.ndarray, std_gy: np.ndarray, levels: Sequence[float] = LEVELS) -> Calibration:
    """Calibrate on voxels whose error is known.

    The floor is the one under which the error divided by the error bar is most alike everywhere: the largest Laplace
    likelihood over a grid. The factors are the levels' quantiles of ``|error| / bar`` (split conformal prediction: Vovk
    et al. 2005; Romano et al., NeurIPS 2019), so intervals cover as they say on cases like these.

    Args:
        error_gy, std_gy: ``(N,)`` prediction minus reference, and the samples' standard deviation.
    """
    size = np.abs(np.asarray(error_gy, dtype=np.float64))
    variance = np.square(np.asarray(std_gy, dtype=np.float64))

    def badness(floor: float) -> float:
        bar = np.sqrt(variance + floor**2)
        return float(np.log(bar).mean() + np.log((size / bar).mean()))

    floor = float(min(np.geomspace(0.02, 20.0, 61), key=badness))
    ratio = size / np.sqrt(variance + floor**2)
    scale = float(np.median(ratio) / 0.6745)
    factors = {level: float(np.quantile(ratio, level) / scale) for level in levels}
    return Calibration(scale, floor, factors)


def coverage(error_gy: np.ndarray, std_gy: np.ndarray, calibration: Calibration) -> dict[float, float]:
    """Share of voxels whose error lies within the interval of each level."""
    bar = calibration.bar_gy(std_gy)
    return {level: float((np.abs(error_gy) <= factor * bar).mean()) for level, factor in calibration.factors.items()}


class CalibrationStudy:
    """Calibrate the spread of samples on one half of the cases and measure its coverage on the other.

    Of whole structures it is asked, on all cases, how often the reference's DVH metric lies within the samples' range:
    were it one more draw among ``K``, it would in ``(K - 1) / (K + 1)`` of them.

    Args:
        dataset: items with ``case``, ``work`` and ``image``.
        network: with its weights.
        inferer: has ``dose_std_and_samples(image, network)``.
        output_dir: gets ``calibration.json`` with the constants, the reliability table and the DVHs' share.
        voxels: drawn from each case's body.
        seed: of the draw.
        device: where the network is.
    """

    def __init__(self, dataset: Sequence[Mapping], network: torch.nn.Module, inferer, output_dir: str | Path,
                 voxels: int = 5000, seed: int = 0, device: torch.device | str = "cpu") -> None:
        self.dataset, self.network, self.inferer = dataset, network, inferer
        self.path, self.voxels = Path(output_dir) / "calibration.json", voxels
        self.rng, self.device = np.random.default_rng(seed), torch.device(device)

    def run(self) -> dict:
        """Do the study; returns and writes the constants and the reliability table.

        Raises:
            CaseError: fewer than two cases.
        """
        if len(self.dataset) < 2:
            raise CaseError(f"calibration: found {len(self.dataset)} case; expected two or more with a reference dose")
        self.network.eval()
        halves: tuple[list, list] = ([], [])
        within: list[bool] = []
        for number in tqdm(range(len(self.dataset)), desc="calibration", unit="case"):
            error_gy, std_gy, hits, drawn = self._case(self.dataset[number])
            halves[number % 2].append((error_gy, std_gy))
            within += hits
        fit, held = (tuple(np.concatenate(parts) for parts in zip(*half)) for half in halves)
        calibration = fit_calibration(*fit)
        raw = Calibration(1.0, 0.0, {level: float(_normal_factor(level)) for level in LEVELS})
        both = fit_calibration(*(np.concatenate(pair) for pair in zip(fit, held)))
        record = {
            "fit_cases": len(halves[0]), "held_out_cases": len(halves[1]),
            "reliability": [{"level": level, "uncalibrated": coverage(*held, raw)[level],
                             "calibrated": coverage(*held, calibration)[level]} for level in LEVELS],
            "std_calibration": [both.scale, both.floor_gy],
            "factors": {str(level): factor for level, factor in both.factors.items()},
            "dvh_metrics": {"number": len(within), "within_samples": float(np.mean(within)) if within else None,
                            "expected": (drawn - 1) / (drawn + 1)},
        }
        write_json(self.path, record)
        for row in record["reliability"]:
            logger.info("level %.2f: coverage %.3f uncalibrated, %.3f calibrated", *row.values())
        logger.info("%d DVH metrics, %s of them within the samples; expected %.3f", *record["dvh_metrics"].values())
        return record

    def _case(self, item: Mapping) -> tuple[np.ndarray, np.ndarray, list[bool], int]:
        """Error and spread of some voxels, which DVH metrics lie within the samples, and how many samples there are."""
        work: Case = item[WORK]
        if work.dose_gy is None:
            raise CaseError(f"case {work.name}: calibration needs a reference dose and found none")
        image = item[Keys.IMAGE][None].to(self.device)
        mean, std, samples = self.inferer.dose_std_and_samples(image, self.network)
        to_gy = DoseScale(work.highest_prescription_gy).to_gy
        inside = np.flatnonzero(work.body)
        inside = self.rng.choice(inside, min(self.voxels, inside.size), replace=False)
        mean, std = (to_gy(volume[0, 0].cpu().numpy()).ravel()[inside] for volume in (mean, std))
        hits = list(_within([to_gy(s[0, 0].cpu().numpy()) for s in samples], work))
        return mean - work.dose_gy.ravel()[inside], std, hits, len(samples)


def _within(samples_gy: Sequence[np.ndarray], case: Case) -> Iterator[bool]:
    """Whether each of OpenKBP's DVH metrics of the reference lies within those of the samples."""
    for name, mask in case.masks.items():
        if name == BODY or not mask.any():
            continue
        reference, *drawn = (openkbp_dvh(dose[mask], 1000 * case.grid.voxel_cc, name in case.prescription_gy)
                             for dose in (case.dose_gy, *samples_gy))
        for metric, value in reference.items():
            values = [own[metric] for own in drawn]
            yield min(values) <= value <= max(values)


def _normal_factor(level: float) -> float:
    return float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.5 + level / 2)))
