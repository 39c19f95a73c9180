"""The release: what it holds, that equal sources give equal zips, and that it predicts on its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from monai.apps import extractall

from custom.case import CaseError
from custom.phantom import make_case, write_study
from custom.release import assemble as assembly
from custom.release import trial
from custom.release.assemble import NAME, assemble, pack, read_json, synchronise_metadata, write_json

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    return assemble(ROOT, tmp_path_factory.mktemp("dist"), formatted=False)


@pytest.fixture(scope="module")
def archive(release) -> Path:
    return pack(release)


def small_root(folder: Path) -> Path:
    """A repository with a bundle of few files, wired as the real one."""
    (folder / "custom" / "release").mkdir(parents=True)
    (folder / "custom" / "__pycache__").mkdir()
    (folder / "custom" / "__pycache__" / "old.py").touch()
    (folder / "custom" / "__init__.py").write_text('__version__ = "0.1.0"\n')
    (folder / "custom" / "release" / "__init__.py").touch()
    (folder / "LICENSE").write_text("Apache\n")
    for part in ("configs", "docs", "models"):
        (folder / "bundle" / part).mkdir(parents=True)
    (folder / "bundle" / "custom").symlink_to(folder / "custom")
    (folder / "bundle" / "eval").mkdir()
    (folder / "bundle" / "eval" / "result.json").write_text("{}")
    (folder / "bundle" / "models" / "model.pt").write_bytes(b"weights")
    (folder / "bundle" / "docs" / "README.md").write_text("run bundle/configs/a.json, not other/bundle/configs\n")
    metadata = {"version": "0.1.0", "network_data_format": {"inputs": {"image": {
        "num_channels": 1, "channel_def": {"0": "old"}}}}}
    write_json(folder / "bundle" / "configs" / "metadata.json", metadata)
    config = {"description": "see bundle/configs", "spatial": ["ct", "body"],
              "condition_channels": "$@spatial + ['site']"}
    (folder / "bundle" / "configs" / "inference.json").write_text(json.dumps(config))
    return folder


def test_release_is_the_zoos_layout(release):
    assert release.name == f"{NAME}_v{read_json(ROOT / 'bundle' / 'configs' / 'metadata.json')['version']}"
    assert {path.name for path in release.iterdir()} == {"LICENSE", "configs", "custom", "docs", "models"}
    assert not [path for path in release.rglob("*") if path.is_symlink()]
    assert not (release / "custom" / "release").exists() and (release / "custom" / "py.typed").is_file()
    weights = (release / "models" / "model.pt").read_bytes()
    assert weights == (ROOT / "bundle" / "models" / "model.pt").read_bytes()


def test_release_holds_what_belongs_and_names_its_own_files(tmp_path):
    bundle = assemble(small_root(tmp_path / "root"), tmp_path / "dist", formatted=False)
    found = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert found == {"LICENSE", "configs/inference.json", "configs/metadata.json", "custom/__init__.py",
                     "docs/README.md", "models/model.pt"}
    assert (bundle / "docs" / "README.md").read_text() == "run configs/a.json, not other/bundle/configs\n"
    assert read_json(bundle / "configs" / "inference.json")["description"] == "see configs"
    image = read_json(bundle / "configs" / "metadata.json")["network_data_format"]["inputs"]["image"]
    assert image == {"num_channels": 3, "channel_def": {"0": "ct", "1": "body", "2": "site"}}


def test_release_replaces_an_earlier_one(tmp_path):
    root = small_root(tmp_path / "root")
    bundle = assemble(root, tmp_path / "dist", formatted=False)
    (bundle / "configs" / "left_over.json").touch()
    assert not (assemble(root, tmp_path / "dist", formatted=False) / "configs" / "left_over.json").exists()


def test_release_without_weights_is_refused(tmp_path):
    root = small_root(tmp_path / "root")
    (root / "bundle" / "models" / "model.pt").unlink()
    with pytest.raises(CaseError, match="model.pt is missing"):
        assemble(root, tmp_path / "dist", formatted=False)


def test_metadata_in_the_repository_is_up_to_date(tmp_path):
    """`make metadata` would change nothing."""
    configs = Path(shutil.copytree(ROOT / "bundle" / "configs", tmp_path / "configs"))
    synchronise_metadata(configs)
    assert (configs / "metadata.json").read_text() == (ROOT / "bundle" / "configs" / "metadata.json").read_text()


def test_equal_releases_give_equal_zips(tmp_path):
    root = small_root(tmp_path / "root")
    zips = []
    for name in ("a", "b"):
        bundle = assemble(root, tmp_path / name, formatted=False)
        os.utime(bundle / "LICENSE", (1e9, 1e9))
        (bundle / "custom" / "__pycache__").mkdir()
        (bundle / "custom" / "__pycache__" / "x.pyc").touch()  # what a run leaves behind
        zips.append(pack(bundle).read_bytes())
    assert zips[0] == zips[1]
    with zipfile.ZipFile(tmp_path / "a" / f"{NAME}_v0.1.0.zip") as packed:
        assert all(name.startswith(f"{NAME}/") for name in packed.namelist())
        assert len(packed.namelist()) == 6


@pytest.mark.parametrize("formatter", ["black", "isort"])
def test_code_is_formatted_as_the_zoo_wants(tmp_path, formatter):
    pytest.importorskip(formatter, reason="the release's tools are not installed (make verify installs them)")
    root = small_root(tmp_path / "root")
    (root / "custom" / "odd.py").write_text("import sys\nimport os\nx = {  'a':os, 'b' : sys }\n")
    text = (assemble(root, tmp_path / "dist") / "custom" / "odd.py").read_text()
    assert text == 'import os\nimport sys\n\nx = {"a": os, "b": sys}\n'


def test_a_missing_formatter_is_told():
    with pytest.raises(CaseError, match="no_such_tool is not installed.*release"):
        assembly.run_tool(("no_such_tool",), Path("."))


# ------------------------------------------------------------------------------------------------------ trial
def test_a_dose_that_makes_no_sense_is_refused():
    def report(mean_gy: float) -> dict:
        return {"case": "hn", "prescription_gy": {"PTV_7000": 70.0, "PTV_5600": 56.0}, "structures": [
            {"name": "PTV_5600", "metrics": {"Mean[Gy]": {"predicted": 56.0}}},
            {"name": "PTV_7000", "metrics": {"Mean[Gy]": {"predicted": mean_gy}}}]}

    assert trial._judged(report(69.0)) == "hn: mean dose of PTV_7000 69.0 Gy of 70 Gy"
    for mean_gy in (0.0, 30.0, 120.0):
        with pytest.raises(CaseError, match="prescribed 70 Gy"):
            trial._judged(report(mean_gy))


def test_an_interpreter_that_is_not_there_is_named(tmp_path):
    metadata = read_json(ROOT / "bundle" / "configs" / "metadata.json")
    with pytest.raises(CaseError, match="no_such_python makes no virtual environment"):
        trial.make_environment(tmp_path / "venv", metadata, "no_such_python")


def test_an_environment_that_knows_the_repository_is_refused(tmp_path):
    archive, python = tmp_path / "b.zip", tmp_path / "python"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr(f"{NAME}/LICENSE", "")
    python.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with pytest.raises(CaseError, match="not from the unpacked release"):
        trial.try_out(archive, python)


@pytest.mark.slow
def test_release_predicts_from_its_zip_in_an_empty_environment(archive):
    """With the packages that metadata.json names and no others; ``$RELEASE_VENV`` keeps the environment.

    ``$RELEASE_PYTHON`` names its interpreter, such as the zoo's python3.10.
    """
    metadata = read_json(ROOT / "bundle" / "configs" / "metadata.json")
    folder = Path(os.environ.get("RELEASE_VENV") or ROOT / ".venv-release")
    python = trial.make_environment(folder, metadata, os.environ.get("RELEASE_PYTHON") or sys.executable)
    listed = subprocess.run([str(python), "-m", "pip", "list", "--format", "json"], capture_output=True, text=True)
    installed = {row["name"].lower().replace("_", "-") for row in json.loads(listed.stdout)}
    assert not installed & {"rt-ct-dose-prediction", "pytest", "jsonschema", "simpleitk"}
    assert "mean dose of PTV_7000" in trial.try_out(archive, python)


@pytest.mark.slow
def test_the_pages_python_loads_the_network_and_runs_the_workflow_to_its_end(archive, tmp_path):
    """The block "From Python" of model_zoo.md as it stands, beside the unpacked zip and a synthetic patient."""
    page = (ROOT / "bundle" / "docs" / "model_zoo.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path / "models")
    case = make_case("HeadNeck", 3, shape=(48, 48, 24))
    write_study(case, tmp_path / "data" / "patient_3", patient_id="ZOO_3")
    script = f"{block}\nassert sum(p.numel() for p in network.parameters()) > 1e6, network\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=900,
                          env={**os.environ, "PYTHONPATH": str(tmp_path / "models" / NAME)})
    assert done.returncode == 0, done.stderr[-3000:]
    report = read_json(tmp_path / "results" / "patient_3" / "report.json")
    assert "mean dose of PTV_7000" in trial._judged(report)
    assert (tmp_path / "results" / "patient_3" / "RTDOSE.dcm").is_file()


@pytest.mark.slow
def test_monai_downloads_and_loads_the_zip_by_name(archive, tmp_path):
    """`python -m monai.bundle download` unpacks it where `monai.bundle.load` finds it."""
    extractall(str(archive), str(tmp_path / "models"), has_base=True)  # as `download` does
    script = (f"import custom, monai.bundle; n = monai.bundle.load('{NAME}', bundle_dir='models', "
              "workflow_type='inference'); "
              "print(custom.__file__, type(n).__module__, sum(p.numel() for p in n.parameters()) > 1e6)")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path / "models" / NAME)})
    wanted = f"{tmp_path}/models/{NAME}/custom/__init__.py custom.networks.addiff_dose True"
    assert done.stdout.strip().endswith(wanted), done.stdout[-500:] + done.stderr[-2000:]
