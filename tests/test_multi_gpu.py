"""Many processes: the gradient of one large batch, and a batch of cases shared out; torchrun with gloo, on CPUs."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from custom.batch import BatchError, Failure
from custom.case import CaseError
from custom.distributed import ShareOfCases, share_of, start
from custom.phantom import make_case, with_dose, write_study
from custom.physics.fluence import plan_dose

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "bundle" / "configs"
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}


def workers_of(launcher: int) -> list[int]:
    """Process ids that a launcher has started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


# ------------------------------------------------------------------------------------------------------ shares
def test_shares_are_a_partition():
    for count in (1, 2, 3, 7):
        shares = [share_of(range(20), rank, count) for rank in range(count)]
        assert sorted(n for share in shares for n in share) == list(range(20))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    with pytest.raises(CaseError, match="RANK is 2, WORLD_SIZE 2; expected a rank from 0 to 1"):
        share_of(range(4), 2, 2)


def finish(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir()
        (folder / name / "report.json").touch()


def names(share: ShareOfCases) -> list[str]:
    return [Path(case["image"]).name for case in share.cases]


def test_what_is_done_is_left_out_and_moves_no_other_case(tmp_path, monkeypatch):
    cases = [{"image": f"/studies/case_{n}"} for n in range(6)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    finish(tmp_path, "case_0", "case_3")
    (tmp_path / "case_1").mkdir()  # begun, not finished
    found = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        found.append(names(ShareOfCases(cases, tmp_path)))
    assert found == [["case_2", "case_4"], ["case_1", "case_5"]]


def test_a_case_that_killed_its_worker_is_tried_last(tmp_path, monkeypatch):
    cases = [{"image": f"/studies/case_{n}"} for n in range(4)]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    finish(tmp_path, "case_0")
    assert names(ShareOfCases(cases, tmp_path)) == ["case_2", "case_3", "case_1"]


def test_a_share_whose_cases_all_fail_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    share = ShareOfCases([{"image": "a"}, {"image": "b"}], tmp_path / "out")

    def fail() -> None:
        raise BatchError("all failed")

    share.run(SimpleNamespace(run=fail, failures=[Failure("b", "no prescription")]))
    assert "no prescription" in (tmp_path / "out" / "failed_1.json").read_text()


def test_a_share_without_cases_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    share = ShareOfCases([{"image": "/studies/case_0"}], tmp_path)
    assert share.cases == []
    share.run(evaluator=None)  # would fail if it were used


def test_training_without_torchrun_is_told_so(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(CaseError, match="RANK.*torchrun --nproc_per_node=2"):
        start(torch.device("cpu"))


# ------------------------------------------------------------------------------------------------------ one gradient
WORKER = """
import json, os, sys
import torch
from torch.utils.data import TensorDataset
from custom import distributed
from custom.engines import PhasedObjective
from custom.networks.addiff_dose import ADDiffDose
from custom.objectives import RegressionObjective

NAMES = ["ct", "plan_prior", "body", "prescription"]

def network():
    torch.manual_seed(7)
    small = {"channels": [4, 8], "encoder_blocks": [1, 1], "decoder_blocks": [1]}
    return ADDiffDose(NAMES, prior=small, denoiser={**small, "attention_levels": []}, ct_encoder=None,
                      structure_widths=[4, 8], token_dim=8)

def batch(rows):
    generator = torch.Generator().manual_seed(3)
    image = torch.rand(4, 4, 8, 8, 8, generator=generator)
    label = torch.rand(4, 1, 8, 8, 8, generator=generator)
    body = (torch.rand(4, 1, 8, 8, 8, generator=generator) > 0.3).float()
    image[:, 2:3] = body
    return {"image": image[rows], "label": label[rows], "body": body[rows]}

def denoised(net, batch):
    "x_0 from x_T = 0: no random numbers, so that runs can be compared."
    conditions = net.encode(batch["image"])
    t = torch.full((len(batch["image"]),), 999)
    x0 = net.denoise(torch.zeros_like(batch["label"]), t, conditions)
    return {"x0": ((x0 - net.from_dose(batch["label"], conditions)).abs() * batch["body"]).mean()}

def train(objective, net, batches):
    # Plain descent: its step is proportional to the gradient, so that a gradient of half the size would be seen.
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.05), []
    for step, rows in enumerate(batches):
        objective.progress = step / len(batches)
        optimizer.zero_grad(set_to_none=True)
        loss = sum(objective(net, batch(rows)).values())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.grad is not None for p in net.parameters()]

def phased():
    return PhasedObjective(RegressionObjective(), denoised, change_at=0.5)

if __name__ == "__main__":
    torch.set_num_threads(1)
    steps = [[0, 1, 2, 3]] * 6
    single = network()
    expected, used = train(phased(), single, steps)
    device = torch.device("cpu")
    rank = distributed.start(device)
    net = network()
    objective = distributed.DistributedObjective(phased(), net)
    losses, used_here = train(objective, net, [distributed.share_of(rows) for rows in steps])
    mean = torch.tensor(losses)
    torch.distributed.all_reduce(mean)
    seen = []
    class Recorded(TensorDataset):
        def __getitem__(self, index):
            seen.append(index)
            return index
    distributed.prepare_shares([Recorded(torch.zeros(5)), Recorded(torch.zeros(1))], num_workers=0)
    sampler = distributed.validation_sampler(range(5))
    try:
        distributed.validation_sampler(range(1))
        refused = ""
    except distributed.CaseError as error:
        refused = str(error)
    difference = max((a - b).abs().max().item() for a, b in zip(net.parameters(), single.parameters()))
    moved = max((a - b).abs().max().item() for a, b in zip(net.parameters(), network().parameters()))
    result = {"expected": expected, "losses": (mean / 2).tolist(), "difference": difference, "moved": moved,
              "used": used == used_here, "some_unused": not all(used), "seen": seen, "validated": list(sampler),
              "refused": refused, "progress": objective.objective.progress}
    with open(os.path.join(sys.argv[1], f"{rank}.json"), "w") as stream:
        json.dump(result, stream)
    distributed.stop()
    assert not torch.distributed.is_initialized()
"""


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("gloo")
    (folder / "worker.py").write_text(WORKER)
    done = subprocess.run([*LAUNCH, str(folder / "worker.py"), str(folder)], env=environment(), capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_train_as_one_with_the_doubled_batch(trained_by_two):
    """Through both phases, of which each leaves other parameters without a gradient."""
    for found in trained_by_two:
        assert found["losses"] == pytest.approx(found["expected"], rel=1e-5)
        assert found["difference"] < 1e-5 < 1e-3 < found["moved"]
        assert found["used"] and found["some_unused"]
        assert found["progress"] == pytest.approx(5 / 6)


def test_two_processes_share_what_is_prepared_and_validated(trained_by_two):
    assert [found["seen"] for found in trained_by_two] == [[0, 2, 4, 0], [1, 3]]
    assert [found["validated"] for found in trained_by_two] == [[0, 2, 4], [1, 3]]
    assert all("1 validation cases for 2 processes" in found["refused"] for found in trained_by_two)


# ------------------------------------------------------------------------------------------------------ the configs
@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> Path:
    """Six coarse synthetic patients with a dose, as DICOM."""
    folder = tmp_path_factory.mktemp("studies")
    for seed in range(3, 9):
        case = make_case("HeadNeck", seed, shape=(40, 40, 20))
        plan = plan_dose(case, beamlet_mm=12.0, iterations=6, normalise=True)
        write_study(with_dose(case, plan.dose_gy), folder / f"HN_{seed}", patient_id=f"HN_{seed}", fluence=plan)
    return folder


def small_network(folder: Path, **more) -> Path:
    """Overlay with the network of the smoke test."""
    path = folder / "small.json"
    network = json.loads((CONFIGS / "smoke.json").read_text())["network_def"]
    path.write_text(json.dumps({"network_def": network, **more}))
    return path


def bundle_run(run_id: str, *files: str | Path, **options) -> list[str]:
    names = [str(CONFIGS / name) for name in files]
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return ["-m", "monai.bundle", "run", run_id, "--config_file", str(names), *flags]


def history(out: Path, name: str) -> list[float]:
    with (out / "history.csv").open() as stream:
        return [float(row["value"]) for row in csv.DictReader(stream) if row["name"] == name]


@pytest.mark.slow
def test_config_trains_alike_with_one_process_and_with_two(studies, tmp_path):
    """Without random transforms: two processes with batches of one, and one process with batches of two."""
    keys = ["image", "label", "body", "rois"]
    fixed = {
        "train#random_transforms": [
            {"_target_": "ResizeWithPadOrCropd", "keys": keys, "spatial_size": [32, 32, 16]},
            {"_target_": "custom.transforms.condition.AppendContextd"},
        ],
        "train#dataloader#num_workers": 0,
        "train#dataloader#persistent_workers": False,
        "train_sampler": {"_target_": "torch.utils.data.SequentialSampler", "data_source": "@train#dataset"},
        "denoiser_from": 1.0, "train_minutes": "$None", "max_epochs": 3, "val_interval": 1, "num_workers": 0,
        "autocast_dtype": "$None",  # AdamW's first steps are the signs of gradients, which bfloat16 rounds otherwise
    }
    one = small_network(tmp_path, **fixed, batch_size=2)
    options = {"dataset_dir": studies, "validation_share": 0.4, "cache_dir": tmp_path / "cache"}
    done = subprocess.run([sys.executable, *bundle_run("train", "inference.json", "train.json", one,
                                                       output_dir=tmp_path / "one", **options)],
                          cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    fixed["train_sampler"] = {"_target_": "DistributedSampler", "dataset": "@train#dataset", "shuffle": False}
    two = small_network(tmp_path, **fixed, batch_size=1)
    done = subprocess.run([*LAUNCH, *bundle_run("train", "inference.json", "train.json", "multi_gpu.json", two,
                                                output_dir=tmp_path / "two", **options)],
                          cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = history(tmp_path / "one", "loss")
    assert len(losses) == 3 and len(set(losses)) == 3
    assert history(tmp_path / "two", "loss") == pytest.approx(losses, rel=1e-3)
    scores = history(tmp_path / "one", "dose_score")
    assert len(scores) == 3
    assert history(tmp_path / "two", "dose_score") == pytest.approx(scores, rel=1e-3)
    states = [torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("one", "two")]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_batch_survives_the_death_of_a_worker_and_leaves_out_what_is_done(studies, tmp_path):
    """One worker is killed after the first result; the launcher starts it again; a broken case is written down."""
    np.savez_compressed(studies / "broken.npz", np.array([1, 2, 3]))
    small = small_network(tmp_path)
    make = ("import sys, torch; from monai.bundle import ConfigParser; p = ConfigParser(); "
            "p.read_config(sys.argv[1:3]); torch.save(p.get_parsed_content('network_def').state_dict(), sys.argv[3])")
    weights, out = tmp_path / "small.pt", tmp_path / "out"
    subprocess.run([sys.executable, "-c", make, str(CONFIGS / "inference.json"), str(small), str(weights)],
                   env=environment(), cwd=ROOT, check=True, capture_output=True)
    run = bundle_run("inference", "inference.json", small, "shards.json", dataset_dir=studies, output_dir=out,
                     weights=weights)
    log = tmp_path / "log.txt"
    with log.open("w") as stream:
        launcher = subprocess.Popen([*LAUNCH, "--max_restarts=3", *run], cwd=ROOT, env=environment(), stdout=stream,
                                    stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 600
    while not list(out.glob("*/report.json")) and time.monotonic() < deadline and launcher.poll() is None:
        time.sleep(0.05)
    workers = workers_of(launcher.pid)
    assert len(workers) == 2, log.read_text()[-3000:]
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*/report.json")}
    assert 0 < len(finished) < 6
    os.kill(workers[1], signal.SIGKILL)
    assert launcher.wait(timeout=1200) == 0, log.read_text()[-3000:]
    reports = {path.parent.name for path in out.glob("*/report.json")}
    assert reports == {f"HN_{seed}" for seed in range(3, 9)}
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    (failures,) = out.glob("failed_*.json")
    assert "broken.npz" in failures.read_text()
    again = subprocess.run([*LAUNCH, *run], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "3 of 7 cases are its own, 3 are done" in again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
