"""Bad cases through MONAI's runner: one message, no traceback, nothing left behind, the other cases done."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch

from custom.io import read_case
from custom.phantom import make_case, write_study
from tests.bad_input import damage
from tests.bad_input.bundle_runs import run, small_network

RESULTS = {"RTDOSE.dcm", "dose.nii.gz", "report.json", "report.html"}


@pytest.fixture(scope="module")
def overlay(tmp_path_factory) -> Path:
    return small_network(tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="module")
def patient(tmp_path_factory) -> Path:
    """One coarse synthetic patient with a name that must not leak."""
    folder = tmp_path_factory.mktemp("patient") / "case"
    write_study(make_case("HeadNeck", 3, shape=(40, 40, 20)), folder, patient_id="ID-4711")
    for path in folder.rglob("*.dcm"):
        with damage.edit(path) as ds:
            ds.PatientName = "Secret^Person"
    return folder


def with_id(folder: Path, patient_id: str) -> Path:
    for path in folder.rglob("*.dcm"):
        with damage.edit(path) as ds:
            ds.PatientID = patient_id
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_message(done, *parts: str) -> None:
    """The run failed with one message that holds ``parts``, and without a traceback."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr + done.stdout, done.stderr[-3000:]
    assert done.stderr.count("Error:") == 1, done.stderr[-3000:]
    message = done.stderr[done.stderr.index("Error:"):]
    for part in parts:
        assert part in message, message


def test_a_batch_with_bad_cases(patient, overlay, tmp_path):
    """Two good cases of one name, and four that cannot be predicted."""
    data, out = tmp_path / "data", tmp_path / "out"
    for folder, patient_id in (("a/case", "A"), ("b/case", "B"), ("c_gap", "C"), ("d_mr", "D"), ("e_no_target", "E")):
        with_id(Path(shutil.copytree(patient, data / folder)), patient_id)
    damage.missing_slice(data / "c_gap")
    damage.on_every_slice(damage.of_class(damage.MR, "MR"))(data / "d_mr")
    (data / "e_no_target" / "RTPLAN.dcm").unlink()
    structures = data / "e_no_target" / "RTSTRUCT.dcm"
    with damage.edit(structures) as ds:
        for roi in ds.StructureSetROISequence:
            roi.ROIName = str(roi.ROIName).replace("PTV", "Muscle")
    (data / "f.npz").write_bytes(b"PK\x03\x04 no archive")
    shutil.copytree(data / "a", out / "c_gap" / "older")  # as if an earlier run had left results
    before = contents(data)
    done = run(overlay, dataset_dir=data, output_dir=out, **{"trained_on#sites": ["Lung"]})
    assert contents(data) == before and {p.name for p in tmp_path.iterdir()} == {"data", "out"}
    one_message(done, "4 of 6 cases failed, the others are done", "c_gap", "slices are missing", "from an earlier run",
                "d_mr", "found MR", "e_no_target", "no prescription", "f.npz", "cut short")
    assert {p.name for p in out.iterdir()} == {"a_case", "b_case", "c_gap"}
    for name in ("a_case", "b_case"):
        assert {p.name for p in (out / name).iterdir()} == RESULTS
        warnings = json.loads((out / name / "report.json").read_text())["warnings"]
        assert any("site HeadNeck was not in the training data (Lung)" in text for text in warnings)
    assert "site HeadNeck was not in the training data" in done.stdout + done.stderr
    assert "Secret" not in done.stdout + done.stderr and "Person" not in done.stdout + done.stderr
    for path in (out / "a_case").iterdir():
        assert (b"Secret" in path.read_bytes()) == (path.name == "RTDOSE.dcm"), path.name


def test_a_misspelt_key(patient, overlay, tmp_path):
    done = run(overlay, dataset_dir=patient, output_dir=tmp_path / "out", prescription=70)
    one_message(done, "unknown key 'prescription' in the command line", "prescription_gy")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_misspelt_key_in_a_config(patient, overlay, tmp_path):
    content = json.loads(overlay.read_text())
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps({**content, "dose_grids": 2.5}))
    one_message(run(bad, dataset_dir=patient, output_dir=tmp_path / "out"), "unknown key 'dose_grids'", "'dose_grid'")
    inferer = {"_target_": "custom.inferers.DoseDiffusionInferer", "steps": 4}
    bad.write_text(json.dumps({**content, "inferer": inferer}))
    one_message(run(bad, dataset_dir=patient, output_dir=tmp_path / "out"), "DoseDiffusionInferer", "'steps'")
    bad.write_text(json.dumps({**content, "inferer": {"_target_": "custom.inferers.Diffuser"}}))
    one_message(run(bad, dataset_dir=patient, output_dir=tmp_path / "out"), "custom.inferers.Diffuser")
    assert not (tmp_path / "out").exists()


class Harmful:
    def __reduce__(self):
        return os.system, (f"touch {Path('ran').absolute()}",)


@pytest.mark.slow
@pytest.mark.parametrize(("content", "message"), [
    (lambda good: good[:len(good) // 2], "not a weights file"), (lambda good: b"", "not a weights file"),
    (lambda good: pickle.dumps(Harmful()), "not a weights file"), (lambda good: None, "no weights at"),
], ids=["cut short", "empty", "code", "absent"])
def test_weights_that_are_none(patient, overlay, tmp_path, content, message):
    weights = tmp_path / "w.pt"
    written = content(Path(json.loads(overlay.read_text())["weights"]).read_bytes())
    if written is not None:
        weights.write_bytes(written)
    done = run(overlay, dataset_dir=patient, output_dir=tmp_path / "out", weights=weights)
    one_message(done, "w.pt", message)
    assert not (tmp_path / "out").exists() and not Path("ran").exists()


@pytest.mark.slow
def test_weights_of_another_network(patient, overlay, tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    done = run(overlay, dataset_dir=patient, output_dir=tmp_path / "out", weights=tmp_path / "w.pt")
    one_message(done, "w.pt", "weights of another network")


@pytest.mark.slow
def test_a_folder_that_cannot_be_written(patient, overlay, tmp_path):
    (tmp_path / "file").write_text("")
    done = run(overlay, dataset_dir=patient, output_dir=tmp_path / "file" / "out")
    one_message(done, "cannot write to", str(tmp_path / "file"), "output_dir")


@pytest.mark.slow
def test_a_disk_that_gets_full(patient, overlay, tmp_path):
    """No file may grow beyond 64 kB: the first of the results that is larger fails, none is left."""
    limit = 2**16
    out = tmp_path / "out"
    done = run(overlay, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)), dataset_dir=patient,
               output_dir=out)
    one_message(done, "cannot write to", "output_dir")
    assert not out.exists() or not list(out.iterdir())


def test_the_case_itself_is_good(patient):
    assert read_case(patient).prescription_gy
