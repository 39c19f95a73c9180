"""The README and the docs pages: every command is run by a test, and everything they point at is there.

A line of a fenced block is a command, unless the block has a language of its own (```text, ```json). Add a command's
row to RUN_BY together with the command.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from monai.bundle import ConfigParser
from PIL import Image

from custom.phantom import make_case, with_dose, write_study
from custom.physics.fluence import plan_dose

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "bundle" / "docs").glob("*.md"))]
CONFIGS = ROOT / "bundle" / "configs"

# How a command begins, whatever its DIR and OUT -> the test that runs it.
RUN_BY = {
    r"make (PYTHON=\S+ )?setup": "every run of the tests, in the environment that it makes",
    r"make help": "test_docs.py::test_make_help_lists_every_target",
    r"PY -m custom\.io": "io/test_packed.py::test_command_packs_a_folder_and_keeps_its_parts",
    r"make test-label": "itself",
    r"make test-deploy": "itself",
    r"make test-second": "itself",
    r"make test-slow": "itself",
    r"pip install -e \.": "make setup, which installs the project so",
    r"pip install \.": "test_package.py::test_the_wheel_holds_code_configs_weights_and_types_and_nothing_else",
    r"rt-dose-demo OUT": "test_package.py::test_the_installed_package_runs_its_demo_without_a_clone",
    r"python3 -m venv": "make setup",
    r"make demo": "test_docs.py::test_make_demo_and_picture",
    r"make picture": "test_docs.py::test_make_demo_and_picture",
    r"PY apps/picture\.py DIR OUT bundle/docs/failures\.png --worst 3":
        "test_apps.py::test_the_worst_cases_are_found_and_drawn",
    r"make test": "every run of the tests",
    r"make label-env": "test_label.py, whose environment it makes",
    r"make deploy-env": "test_deploy.py, whose environment it makes",
    r"make label-server": "test_label.py::test_info_names_the_model_its_isodoses_and_its_options",
    r"make deploy-package": "test_deploy.py::test_the_package_folder_runs_by_itself",
    r"mkdir -p OUT": "the shell",
    r"\.venv-label/bin/python apps/label/make_app\.py add demo/label-studies DIR":
        "test_label.py::test_the_viewers_volume_stands_for_its_study",
    r"\.venv-label/bin/python apps/label/make_app\.py app demo/label":
        "test_label.py::test_info_names_the_model_its_isodoses_and_its_options",
    r"\.venv-label/bin/python apps/label/make_app\.py app demo/label --levels":
        "test_label.py::test_levels_of_ones_own",
    r"curl -X POST .*/infer/rt_ct_dose_prediction": "test_label.py::test_the_curl_commands_of_the_page",
    r"curl .*/info/": "test_label.py::test_the_curl_commands_of_the_page",
    r"\.venv-deploy/bin/python apps/deploy": "test_deploy.py::test_writes_the_dose_that_the_runner_writes",
    r"DOSE_OPTIONS=.* \.venv-deploy/bin/python apps/deploy":
        "test_deploy.py::test_options_come_through_the_environment_without_a_plan",
    r"\.venv-deploy/bin/monai-deploy package": "test_deploy.py::test_the_packager_takes_the_folders_as_far_as_docker",
    r"PY -m monai\.bundle run inference": "test_bundle.py::test_the_demo_case_gets_a_real_prediction",
    r"PY -m monai\.bundle run evaluate": "test_bundle.py::test_evaluate_writes_the_scores",
    r"PY -m monai\.bundle run train_autoencoder": "test_bundle.py::test_training_in_stages_survives_a_kill",
    r"PY -m monai\.bundle run train_broad": "test_bundle.py::test_training_in_stages_survives_a_kill",
    r"PY -m monai\.bundle run train_dvh": "test_bundle.py::test_training_in_stages_survives_a_kill",
    r"PY -m monai\.bundle run train": "test_bundle.py::test_training_in_stages_survives_a_kill",
    r"PY -m custom\.phantom OUT": "test_phantom.py::test_command_line",
    # many_machines.md, experiments.md
    r"torchrun --standalone --nproc_per_node=2 -m monai\.bundle run train":
        "test_multi_gpu.py::test_config_trains_alike_with_one_process_and_with_two",
    r"torchrun --standalone --nproc_per_node=2 --max_restarts=3 -m monai\.bundle run inference":
        "test_multi_gpu.py::test_batch_survives_the_death_of_a_worker_and_leaves_out_what_is_done",
    r"PY -m monai\.bundle run --args_file bundle/configs/args/train\.json":
        "test_experiments.py::test_training_from_an_argument_file_draws_pictures_and_is_tracked",
    r"make dockerfile": "test_experiments.py::test_linter_accepts_the_dockerfile",
    # model_zoo.md
    r"make (RELEASE_PYTHON=\S+ )?release":
        "test_release.py::test_release_predicts_from_its_zip_in_an_empty_environment",
    r"make verify": "test_verify.py::test_make_verify_passes",
    r"make metadata": "test_release.py::test_metadata_in_the_repository_is_up_to_date",
    r"PY -m monai\.bundle ckpt_export": "test_verify.py::test_monai_loads_traces_and_accepts_the_bundle",
    # constraints.md
    r"PY -m monai\.bundle run limits": "test_studies_run.py::test_edited_limits",
    r"PY -m monai\.bundle run guidance": "test_studies_run.py::test_guidance",
    # studies.md
    r"PY -m monai\.bundle run steps": "test_studies_run.py::test_steps",
    r"PY -m monai\.bundle run robustness": "test_studies_run.py::test_robustness",
    r"PY -m monai\.bundle run calibration": "test_studies_run.py::test_calibration",
    r"PY -m monai\.bundle run ablations":
        "test_ablations.py::test_the_commands_of_the_page",
    r"make bench": "test_studies_run.py::test_benchmark",
    # reliability.md, safety.md
    r"make fuzz": "fuzz/test_bytes.py::test_damaged_bytes",
    r"make faults": "faults/test_kill.py::test_batch_inference",
    r"make audit(-code)?": "itself: a check of code and dependencies",
    # systems.md
    r"PY -m monai\.bundle run step_curve": "test_systems.py::test_studies_of_steps_and_seeds",
    r"PY -m monai\.bundle run seed_study": "test_systems.py::test_studies_of_steps_and_seeds",
    r"PY -m monai\.bundle run comparison": "test_systems.py::test_comparison_makes_table_and_figures",
}
# What cannot be run where the tests are, and how its page says so.
NOT_RUN = {
    r"docker (build|run) ": "not been built",
    r"torchrun --nnodes=4": "were not to be had",
    r"head=\$\(scontrol|srun torchrun": "were not to be had",
    r"RANK=\$SLURM": "were not to be had",
    r"tensorboard --logdir": "TensorBoard",  # shows files that a test reads
    r"pip install mlflow": "MLflow",
    r"pip install -e '\.\[gamma\]'": "its tests are skipped there",
}
PYTHONS = re.compile(r"^(\.venv/bin/)?python(?= )")


def blocks(page: Path) -> list[tuple[str, list[str]]]:
    """Language and lines of every fenced block."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [(language, text.replace("\\\n", " ").splitlines()) for language, text in found]


def commands() -> list[tuple[str, str]]:
    """``(page, command)`` of every command, without its remark."""
    found = []
    for page in PAGES:
        for language, lines in blocks(page):
            if language in ("", "sh", "bash"):
                found += [(page.relative_to(ROOT).as_posix(), re.sub(r"\s{2,}#.*", "", line).strip())
                          for line in lines if line.strip() and not line.startswith("#")]
        found += [(page.relative_to(ROOT).as_posix(), re.sub(r"\s+", " ", code)) for code in
                  re.findall(r"`([^`]+)`", prose(page)) if re.match(r"(make|pip|python3?|torchrun|docker) ", code)]
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


COMMANDS = commands()
every_command = pytest.mark.parametrize(("page", "command"), COMMANDS)


def rows_for(command: str) -> list[str]:
    """Rows of RUN_BY that stand for a command; of those that begin alike the longest."""
    plain = PYTHONS.sub("PY", command)
    found = [row for row in RUN_BY if re.match(row + r"(\s|\b|$)", plain)]
    return sorted(found, key=len)[-1:]


@every_command
def test_every_command_is_run_by_a_test(page, command):
    not_run = [said for row, said in NOT_RUN.items() if re.match(row, command)]
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    if not_run:
        assert not_run[0] in text, f"{page}: say that {command!r} was not run"
        return
    assert rows_for(command), f"{page}: no test runs {command!r}; write one and name it in RUN_BY"


def test_the_tests_named_are_there():
    for by in RUN_BY.values():
        file, _, name = by.partition("::")
        if name:
            tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
            assert name in [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)], by


def test_no_row_outlives_its_command():
    used = {row for _, command in COMMANDS for row in rows_for(command)}
    assert set(RUN_BY) - used == set()


def options_of(command: str) -> tuple[str, list[Path], list[str]]:
    """Run id, config files and other options of a runner's command."""
    words = shlex.split(command)
    run_id = words[words.index("run") + 1]
    files = ast.literal_eval(value) if (value := words[words.index("--config_file") + 1]).startswith("[") else [value]
    options = [word[2:] for word in words if word.startswith("--") and word != "--config_file"]
    return run_id, [ROOT / name for name in files], options


@pytest.mark.parametrize(("page", "command"), [row for row in COMMANDS if "monai.bundle run" in row[1]
                                               and "--config_file" in row[1] and "torchrun" not in row[1]])
def test_what_a_runners_command_names_is_in_its_configs(page, command):
    run_id, files, options = options_of(command)
    assert all(path.is_file() for path in files), f"{page}: {files}"
    parser = ConfigParser()
    parser.read_config([str(path) for path in files])
    known = set(parser.config)
    assert run_id in known, f"{page}: no id {run_id!r} in {[path.name for path in files]}"
    set_here = {name.partition("#")[0] for name in options}  # "network_def#broad#members" sets an argument
    assert set_here - {"tracking"} <= known, f"{page}: {command!r} sets what nothing reads"


def described() -> list[tuple[str, str]]:
    """``(config, command)`` of the commands in the configs' own descriptions."""
    found = []
    for path in sorted(CONFIGS.rglob("*.json")):
        text = str(json.loads(path.read_text(encoding="utf-8")).get("description"))
        pattern = r"run \w+ --config_file (?:\"\[.*?\]\"|\S+)(?: --\w+ [\w./]*\w)*"
        found += [(path.relative_to(CONFIGS).as_posix(), command) for command in re.findall(pattern, text)]
    return found


@pytest.mark.parametrize(("config", "command"), described())
def test_what_a_configs_description_names_is_there(config, command):
    run_id, files, options = options_of(command)
    assert all(path.is_file() for path in files), f"{config}: {files}"
    keys = {key.removeprefix("+") for path in files for key in json.loads(path.read_text(encoding="utf-8"))}
    assert {run_id, *options} <= keys, f"{config}: {command!r} names what is in none of its files"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_spoken_of_exist(page):
    keys = {key.removeprefix("+") for path in CONFIGS.rglob("*.json") for key in json.loads(path.read_text())}
    elsewhere = {"config_file", "args_file", "tracking", "use_trace", "levels", "platform", "sdk-version", "conf",
                 "nproc_per_node", "max_restarts", "standalone", "nnodes"}
    codes = re.findall(r"`([^`]+)`", prose(page))
    spoken = {name for code in codes for name in re.findall(r"(?<!\S)--([A-Za-z_-]+)", code)}
    assert spoken - keys - elsewhere == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_are_there(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith(("http", "mailto")):
            assert (page.parent / target).exists(), f"{page.name}: no {target}"
    for target in re.findall(r"`((?:bundle|custom|apps|tests)/[\w./-]*)`", text):
        assert (ROOT / target).exists() or "/my_" in target, f"{page.name}: no {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?:^|`)make (?:[A-Z_]+=\S+ )*([a-z-]+)", text, re.MULTILINE)
    assert set(named) - targets == set()


def test_make_help_lists_every_target():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.strip()}
    phony = re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {name for line in phony for name in line.split()} <= listed


def test_the_picture_of_the_house_shows_every_room():
    text = (ROOT / "bundle" / "docs" / "design.md").read_text(encoding="utf-8")
    rooms = re.findall(r"^\|([^|]+)\|", text[text.index("## Rooms"):], re.MULTILINE)
    shown = {re.sub(r"(\.py|/|\*)", "", name) for row in rooms for name in re.findall(r"`([^`]+)`", row)}
    tree = ast.parse((ROOT / "tests" / "test_layers.py").read_text(encoding="utf-8"))
    (layers,) = [ast.literal_eval(node.value) for node in tree.body
                 if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS"]
    missing = {room for level in layers for room in level} - shown
    assert missing == set(), "a room that bundle/docs/design.md does not show"


def test_the_picture_is_there():
    with Image.open(ROOT / "bundle" / "docs" / "dose.png") as picture:
        assert picture.width > 800
    assert "bundle/docs/dose.png" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def planned_study(tmp_path_factory) -> Path:
    """A coarse synthetic patient with a planned dose, as DICOM."""
    case = make_case("HeadNeck", 3, shape=(48, 48, 24))
    plan = plan_dose(case, beamlet_mm=10.0, iterations=15, normalise=True)
    folder = tmp_path_factory.mktemp("dicom") / "patient_3"
    return write_study(with_dose(case, plan.dose_gy), folder, patient_id="DOCS_3", fluence=plan)


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted({command for _, command in COMMANDS
                                            if re.search(r"run (inference|evaluate) ", command)
                                            and "torchrun" not in command and "systems/" not in command}))
def test_the_runners_commands_as_they_are_written(command, planned_study, tmp_path):
    shell = PYTHONS.sub(lambda _: sys.executable, command).replace(" DIR", f" {planned_study}").replace(
        " OUT", f" {tmp_path}/out")
    done = subprocess.run(shell, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    written = "metrics.json" if "evaluate" in command else "patient_3/RTDOSE.dcm"
    assert (tmp_path / "out" / written).is_file()


@pytest.mark.slow
def test_make_demo_and_picture(tmp_path):
    """Both commands of the README, into a folder of their own; not where make would first change the environment."""
    venv = Path(sys.prefix)
    stamped = subprocess.run(["make", "-q", "setup", f"VENV={venv}"], cwd=ROOT, capture_output=True, timeout=60)
    if stamped.returncode:
        pytest.skip(f"{venv} was not made by `make setup` for these constraints")
    command = ["make", "picture", f"VENV={venv}", f"DEMO={tmp_path}/demo", f"PICTURE={tmp_path}/dose.png"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    for name in ("RTDOSE.dcm", "dose.nii.gz", "report.html", "report.json"):
        assert (tmp_path / "demo" / "results" / "hn_demo" / name).stat().st_size > 1000
    with Image.open(tmp_path / "dose.png") as picture:
        assert picture.width > 800 and len(set(picture.convert("RGB").resize((64, 64)).getdata())) > 500
