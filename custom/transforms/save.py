"""From the network's output to Gy on the patient's own grid, and from there to files."""

from __future__ import annotations

import contextlib
import glob
import math
import os
import shutil
import socket
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, SaveImaged
from scipy import ndimage

from custom.case import Case, CaseError, DoseScale, Grid, Keys, OutputError, resample
from custom.dosimetry.constraints import load_constraints
from custom.dosimetry.gamma import CUTOFF_PERCENT, parse_criteria
from custom.io.nifti import write_nifti
from custom.io.openkbp import write_dose_csv
from custom.io.rtdose import write_rtdose
from custom.metrics import case_metrics
from custom.report import make_report, write_report

__all__ = ["CaseMetricsd", "RestoreDosed", "SaveImageRTDosed"]

WORK = "work"
RESULTS = {"RTDOSE.dcm", "dose.nii.gz", "dose_std.nii.gz", "dose.csv", "report.json", "report.html"}
MARK = "predicted dose, not for clinical use"


class RestoreDosed(MapTransform):
    """Network output to dose in Gy on the case's own grid: the inverse of everything preprocessing did.

    ``data[key]`` is ``(1, X, Y, Z)``, or ``(2, X, Y, Z)`` with the standard deviation over samples as second channel,
    in fractions of the highest prescription on the working grid. It becomes a MetaTensor ``(1, I, J, K)`` in Gy on the
    grid of ``data["case"]``, finite, not negative and zero outside the body; the standard deviation goes to
    ``data["pred_std"]``.

    Args:
        keys: key of the network's output.
        std_calibration: ``(scale, floor in Gy)``: the standard deviation becomes ``scale * sqrt(std^2 + floor^2)`` in
            the body, as :class:`custom.studies.CalibrationStudy` measured it; None leaves the samples' own.
    """

    def __init__(self, keys: KeysCollection = Keys.PRED, std_calibration: Sequence[float] | None = None) -> None:
        super().__init__(keys)
        self.std_calibration = None if std_calibration is None else tuple(std_calibration)

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        out = dict(data)
        case, work = out[Keys.CASE], out[WORK]
        for key in self.key_iterator(out):
            volumes = out[key].detach().float().cpu().numpy()
            if not np.isfinite(volumes).all():
                raise CaseError(f"case {case.name}: the network gave values that are not finite; expected a dose. "
                                "Check the weights and the input's range")
            restored = [_restore(volume, work, case) for volume in volumes]
            affine = torch.as_tensor(case.grid.ras_affine)
            out[key] = MetaTensor(torch.from_numpy(restored[0][None]), affine=affine)
            if len(restored) > 1:
                std_gy = restored[1]
                if self.std_calibration is not None:
                    scale, floor_gy = self.std_calibration
                    std_gy = np.where(case.body, scale * np.sqrt(np.square(std_gy) + floor_gy**2), np.float32(0.0))
                std_gy = std_gy.astype(np.float32)
                out[Keys.STD] = MetaTensor(torch.from_numpy(std_gy[None]), affine=affine)
        return out


def _restore(fraction: np.ndarray, work: Case, case: Case) -> np.ndarray:
    """Voxels at the skin are interpolated from inside the body only, as the network's values outside mean nothing."""
    nearest = ndimage.distance_transform_edt(~work.body, sampling=work.grid.spacing_mm, return_distances=False,
                                             return_indices=True)
    dose_gy = DoseScale(case.highest_prescription_gy).to_gy(np.maximum(fraction[tuple(nearest)], 0.0))
    return np.where(case.body, resample(dose_gy, work.grid, case.grid), np.float32(0.0))


class CaseMetricsd(MapTransform):
    """Score ``data[key]`` (Gy on the case's grid) against the reference dose; the row goes to ``data["metrics"]``.

    Args:
        keys: key of the dose.
        constraints: the protocol whose compliance is measured, of the dose and of the reference; None takes the
            bundle's ``constraints.json``.
        gamma_criteria: pass rates to measure too, as ``"3%/3mm"`` or ``"2%/2mm local"``; they want the extra ``gamma``
            and take seconds to minutes a case. For the report they go to ``data["gamma"]`` as well.
    """

    def __init__(self, keys: KeysCollection = Keys.PRED, constraints: str | Path | None = None,
                 gamma_criteria: Sequence[str] = ()) -> None:
        super().__init__(keys)
        self.constraints, self.gamma_criteria = load_constraints(constraints), parse_criteria(gamma_criteria)

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        out = dict(data)
        for key in self.key_iterator(out):
            case: Case = out[Keys.CASE]
            if case.dose_gy is None:
                raise CaseError(f"case {case.name}: evaluation needs a reference dose (RTDOSE, dose.csv or 'dose' in "
                                f"the npz); found none in {case.source.get('path')}")
            dose_gy = out[key][0].numpy()
            out["metrics"] = {"case": case.name, **case_metrics(case, dose_gy, self.constraints)}
            out["gamma"] = []
            for criterion in self.gamma_criteria:
                percent = criterion.pass_percent(dose_gy, case.dose_gy, case.grid, case.body)
                out["metrics"][criterion.name] = percent
                out["gamma"].append({**asdict(criterion), "cutoff_percent": CUTOFF_PERCENT, "pass_percent": percent})
        return out


class SaveImageRTDosed(SaveImaged):
    """Write a case's results to ``<output_dir>/<case>/``, all of them or none.

    ``RTDOSE.dcm``, ``dose.nii.gz``, ``report.json`` and ``report.html``; for OpenKBP input ``dose.csv`` besides;
    ``dose_std.nii.gz`` where there are samples. A subclass of SaveImaged with "SaveImage" in
    its name, so that MONAI Label and MONAI Deploy leave it out of their pipelines.

    Args:
        keys: key of the dose in Gy on the case's grid.
        output_dir: folder of the results.
        dose_grid: ``"ct"``; ``"plan"`` for the grid of the RTDOSE that came along; or a voxel size in mm.
        files: which of ``"rtdose"``, ``"nifti"``, ``"report"``, ``"csv"`` to write.
        model: facts about the model for the report, such as its name and version.
        constraints: the protocol of the report; None takes the bundle's ``constraints.json``.
    """

    def __init__(self, keys: KeysCollection = Keys.PRED, output_dir: str | Path = "eval",
                 dose_grid: str | float = "ct", files: Sequence[str] = ("rtdose", "nifti", "report", "csv"),
                 model: Mapping[str, object] | None = None, constraints: str | Path | None = None) -> None:
        super().__init__(keys, output_dir=output_dir, print_log=False)
        is_size = isinstance(dose_grid, (int, float)) and not isinstance(dose_grid, bool) and 0 < dose_grid < math.inf
        if dose_grid not in ("ct", "plan") and not is_size:
            raise CaseError(f"dose_grid: found {dose_grid!r}; expected 'ct', 'plan' or a voxel size in mm")
        self.output_dir, self.dose_grid, self.files, self.model = Path(output_dir), dose_grid, set(files), model
        self.constraints = load_constraints(constraints)

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        case: Case = data[Keys.CASE]
        for key in self.key_iterator(data):
            dose_gy = data[key][0].numpy()
            std = data.get(Keys.STD)
            with whole_folder(self.output_dir / case.name) as folder:
                self._write(folder, case, dose_gy, None if std is None else std[0].numpy(),
                            data.get("warnings", ()), data.get("gamma", ()))
        return dict(data)

    def _write(self, folder: Path, case: Case, dose_gy: np.ndarray, std_gy: np.ndarray | None, warnings,
               gamma) -> None:
        grid = self._grid(case)
        on_grid = dose_gy if grid is case.grid else resample(dose_gy, case.grid, grid)
        source_format = case.source.get("format")
        if "rtdose" in self.files:
            write_rtdose(folder / "RTDOSE.dcm", on_grid, grid, case.source.get("references") or {})
        if "nifti" in self.files:
            write_nifti(folder / "dose.nii.gz", on_grid, grid, f"Gy, {MARK}")
            if std_gy is not None:
                std_on_grid = std_gy if grid is case.grid else resample(std_gy, case.grid, grid)
                write_nifti(folder / "dose_std.nii.gz", std_on_grid, grid, f"standard deviation in Gy, {MARK}")
        if "csv" in self.files and source_format == "openkbp":
            write_dose_csv(folder / "dose.csv", dose_gy, case.body)
        if "report" in self.files:
            record = make_report(case, dose_gy, dose_std_gy=std_gy, warnings=warnings, model=self.model,
                                 constraints=self.constraints, gamma=gamma)
            write_report(record, case, dose_gy, folder)

    def _grid(self, case: Case) -> Grid:
        if self.dose_grid == "ct" or (self.dose_grid == "plan" and case.dose_grid is None):
            return case.grid
        if self.dose_grid == "plan":
            return case.dose_grid
        extent = case.grid.spacing_mm * (np.array(case.grid.shape) - 1)
        shape = np.floor(extent / float(self.dose_grid)).astype(int) + 1
        affine = case.grid.affine.copy()
        affine[:3, :3] *= float(self.dose_grid) / case.grid.spacing_mm
        return replace(case.grid, shape=tuple(shape), affine=affine)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder beside ``folder`` that takes its place, in one step, when the block ends without an error.

    Results that are there already go; files of others in ``folder`` stay. What a killed run left behind is removed.

    Raises:
        OutputError: no space, or no right to write.
    """
    prefix = f".{folder.name}.part.{socket.gethostname()}."
    partial = folder.with_name(f"{prefix}{os.getpid()}")
    try:
        _remove_orphans(folder, prefix)
        partial.mkdir(parents=True)
        yield partial
        _put_in_place(partial, folder)
    except OSError as error:
        raise OutputError(f"cannot write to {folder.parent}: {_reason(error)}; free space there, or choose another "
                          "output_dir") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """What the system said; pydicom wraps it in an error whose text is a traceback."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error)


def _put_in_place(partial: Path, folder: Path) -> None:
    """Exchange ``folder`` for ``partial``; at every moment it is the old one, absent or the new one."""
    if not folder.exists():
        os.rename(partial, folder)
        return
    for path in folder.iterdir():
        if path.name not in RESULTS and not (partial / path.name).exists():
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, partial / path.name)
    old = partial.with_name(f"{partial.name}.old")
    os.rename(folder, old)
    os.rename(partial, folder)
    shutil.rmtree(old)


def _remove_orphans(folder: Path, prefix: str) -> None:
    """Remove hidden folders of runs on this machine that are no more; older results they put aside come back."""
    orphans = [p for p in folder.parent.glob(f"{glob.escape(prefix)}*") if _is_orphan(p.name[len(prefix):])]
    for path in sorted(orphans, reverse=True):  # "<pid>.old" before "<pid>"
        if path.name.endswith(".old") and not folder.exists():
            os.rename(path, folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_orphan(owner: str) -> bool:
    """Whether the process of a name ``<pid>`` or ``<pid>.old`` has ended, as one of our own number has."""
    pid = owner.split(".")[0]
    if not pid.isdigit():
        return False
    if int(pid) == os.getpid():  # a container starts anew with the same numbers
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
