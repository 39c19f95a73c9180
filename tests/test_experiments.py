"""What one runs experiments with: pictures in TensorBoard, argument files, MLflow, the Dockerfile; and their pages."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

from custom.pictures import dose_pictures
from custom.release.checks import requirements

ROOT = Path(__file__).resolve().parents[1]
CONFIGS, DOCS = ROOT / "bundle" / "configs", ROOT / "bundle" / "docs"
ARGUMENTS = sorted((CONFIGS / "args").glob("*.json"))
PAGES = ("model_zoo.md", "many_machines.md", "experiments.md")


# ------------------------------------------------------------------------------------------------------ pictures
def test_picture_shows_prediction_reference_and_difference_where_the_dose_is():
    label = torch.zeros(2, 4, 3, 5)
    label[0, :, :, 3] = 1.0  # most dose in the plane z = 3
    label[1] = 99.0  # a second channel, as the validation's packed label has, is not looked at
    pred = label[:1].clone()
    pred[0, 0, 2, 3] = 1.4  # too much at x = 0, y = 2
    (picture,) = dose_pictures([{"pred": pred, "label": label}])
    assert picture.shape == (3, 3, 12) and 0 <= picture.min() and picture.max() <= 1
    predicted, reference, difference = picture.split(4, dim=2)
    assert torch.equal(reference, reference[:, :1, :1].expand_as(reference))
    changed = (predicted - reference).abs().sum(0) > 0
    assert changed.nonzero().tolist() == [[2, 0]]
    red, _, blue = difference[:, 2, 0]
    assert red > blue + 0.4 and torch.allclose(difference[:, 0, 0], torch.tensor([0.867, 0.864, 0.863]), atol=0.01)


def test_pictures_of_cases_of_different_size_fit_together():
    sizes = [(4, 3, 2), (2, 6, 2)]
    items = [{"pred": torch.ones(1, *size), "label": torch.ones(1, *size)} for size in sizes]
    assert dose_pictures(items).shape == (2, 3, 6, 12)


# ------------------------------------------------------------------------------------------------------ arguments
@pytest.mark.parametrize("path", ARGUMENTS, ids=lambda path: path.stem)
def test_argument_file_names_configs_and_known_keys(path):
    arguments = json.loads(path.read_text())
    files = arguments.pop("config_file")
    files = [files] if isinstance(files, str) else files
    parser = ConfigParser()
    parser.read_config([str(ROOT / name) for name in files])
    assert arguments.pop("run_id") in parser
    assert [key for key in arguments if key not in parser] == []


def commands(page: str) -> list[str]:
    """Command lines of a page's blocks, continued lines joined; Python, Slurm's settings and comments left out."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?!python)\w*\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_what_is_there(page):
    """Every config, argument file, make target and page that a page's commands and links name."""
    text = (DOCS / page).read_text(encoding="utf-8")
    assert commands(page)
    for name in re.findall(r"(?<![\w/])bundle/configs/[\w/]+\.json", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"\]\((\w+\.md)\)", text):
        assert (DOCS / name).is_file(), name
    for target in re.findall(r"make ([a-z-]+)", text):
        if target != "fail":
            subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("page", PAGES)
def test_bundle_commands_of_pages_have_known_options(page):
    for line in commands(page):
        if "-m monai.bundle run" not in line:
            continue
        words = shlex.split(line[line.index("-m monai.bundle run"):])[3:]
        options = {word[2:]: value for word, value in zip(words, [*words[1:], ""]) if word.startswith("--")}
        if "args_file" in options:
            files = json.loads((ROOT / options.pop("args_file")).read_text())["config_file"]
        else:
            files = ConfigParser({"f": options.pop("config_file")}).get_parsed_content("f")
            files = json.loads(files.replace("'", '"')) if isinstance(files, str) and files[0] == "[" else files
        parser = ConfigParser()
        parser.read_config([str(ROOT / name) for name in ([files] if isinstance(files, str) else files)])
        assert [key for key in options if key not in parser and key != "tracking"] == [], line


# ------------------------------------------------------------------------------------------------------ container
def test_linter_accepts_the_dockerfile():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}") or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (make dockerfile installs it)")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    faulty = subprocess.run([hadolint, "-"], input="FROM debian\nRUN apt-get install x\n", text=True,
                            capture_output=True)
    assert faulty.returncode != 0


def test_dockerfile_copies_what_exists_and_installs_what_the_metadata_names(tmp_path):
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for source in re.findall(r"^COPY (\S+)", text, flags=re.MULTILINE):
        assert (ROOT / source).exists()
        assert any(source == line[1:] or source.startswith(f"{line[1:]}/") for line in ignored if line[0] == "!")
    script = re.search(r'python -c "(.*?)" > requirements', text.replace("\\\n", ""), flags=re.DOTALL)[1]
    shutil.copytree(CONFIGS, tmp_path / "configs")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == requirements(json.loads((CONFIGS / "metadata.json").read_text()))


# ------------------------------------------------------------------------------------------------------ a training
@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> Path:
    from custom.phantom import make_case, with_dose, write_study
    from custom.physics.fluence import plan_dose

    folder = tmp_path_factory.mktemp("studies")
    for seed in (3, 4, 5):
        case = make_case("HeadNeck", seed, shape=(40, 40, 20))
        plan = plan_dose(case, beamlet_mm=12.0, iterations=6, normalise=True)
        name = f"HeadNeck_{seed}"
        write_study(with_dose(case, plan.dose_gy), folder / name, patient_id=name, fluence=plan)
    return folder


def run_arguments(folder: Path, name: str, *overlays: str, **options) -> subprocess.CompletedProcess:
    """Run an argument file of the bundle with overlays that make it short."""
    arguments = json.loads((CONFIGS / "args" / name).read_text())
    files = arguments["config_file"]
    files = [files] if isinstance(files, str) else files
    arguments["config_file"] = [*files, *overlays]
    path = folder / "args.json"
    path.write_text(json.dumps(arguments))
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return subprocess.run([sys.executable, "-m", "monai.bundle", "run", "--args_file", str(path), *flags], cwd=ROOT,
                          capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
def test_training_from_an_argument_file_draws_pictures_and_is_tracked(studies, tmp_path):
    """TensorBoard has the loss and a picture a validation; with mlflow installed, its store has the loss and score."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked = find_spec("mlflow") is not None
    out = tmp_path / "out"
    done = run_arguments(tmp_path, "train.json", "bundle/configs/smoke.json", dataset_dir=studies, output_dir=out,
                         validation_share=0.45, train_minutes="$None", **({"tracking": "mlflow"} if tracked else {}))
    assert done.returncode == 0, done.stderr[-3000:]
    pictures, losses = [], []
    for path in out.glob("events.out.tfevents.*"):
        events = EventAccumulator(str(path)).Reload()
        pictures += [event for tag in events.Tags()["images"] for event in events.Images(tag)]
        losses += [event for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]
    assert [event.step for event in pictures] == [2, 4] and losses
    assert pictures[0].width > 2 * pictures[0].height  # three panels side by side
    if not tracked:
        pytest.skip("pictures were drawn; mlflow is not installed, so tracking was not tried")
    with sqlite3.connect(out / "mlruns.db") as store:
        names = {name for (name,) in store.execute("select distinct key from metrics")}
    assert {"train_loss", "dose_score"} <= names
    assert list(out.glob("config_*.json"))
