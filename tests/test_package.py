"""The Python package: what its wheel holds, and that the wheel's demo runs without a clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from custom import __version__, demo

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md", "constraints.txt")
PARTS = ("custom", "bundle/configs", "bundle/models")
SHAPE = ("48", "48", "24")  # a coarse patient


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy to build in, as setuptools leaves its work beside the sources."""
    root = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        shutil.copy(ROOT / name, root)
    for part in PARTS:
        shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    """Built by the installed setuptools, so that no network is needed."""
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
               "--disable-pip-version-check", "-w", str(folder), str(sources)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_code_configs_weights_and_types_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        info = f"rt_ct_dose_prediction-{__version__}.dist-info"
        entries = packed.read(f"{info}/entry_points.txt").decode()
        metadata = Parser().parsestr(packed.read(f"{info}/METADATA").decode())
    assert wheel.name == f"rt_ct_dose_prediction-{__version__}-py3-none-any.whl"
    assert {name.split("/")[0] for name in names} == {"custom", info}
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "custom").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == {
        name for name in code if not name.startswith("custom/release/")}
    assert "custom/py.typed" in names and f"{info}/licenses/LICENSE" in names
    shipped = {path.relative_to(ROOT).as_posix() for part in ("configs", "models")
               for path in (ROOT / "bundle" / part).rglob("*") if path.is_file()}
    assert {name for name in names if name.startswith("custom/bundle/")} == {f"custom/{name}" for name in shipped}
    assert "rt-dose-demo = custom.demo:main" in entries
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.10"


@pytest.mark.slow
def test_the_source_distribution_builds_the_same_wheel(sources, wheel, tmp_path):
    """What PyPI would get has the bundle too."""
    script = f"from setuptools import build_meta as b; b.build_sdist({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", script], cwd=sources, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (archive,) = tmp_path.glob("*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
               "--disable-pip-version-check", "-w", str(tmp_path), str(archive)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with zipfile.ZipFile(tmp_path / wheel.name) as one, zipfile.ZipFile(wheel) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())


def test_a_demo_without_its_bundle_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(demo, "bundle_folder", lambda: tmp_path / "nowhere")
    assert demo.main([str(tmp_path / "out")]) == 1
    assert "Install the package anew" in caplog.text and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "bundle" / "models" / "model.pt").is_file(), reason="no trained weights")
def test_the_installed_package_runs_its_demo_without_a_clone(wheel, tmp_path):
    """In a virtual environment that has the wheel, and sees this one's other packages but not this repository."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=True)
    scheme = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv" if "venv" in sysconfig.get_scheme_names() else "posix_prefix",
                                   scheme))
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # the .pth files in there are not read
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    options = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True, "timeout": 1800}
    done = subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "--no-deps", "--force-reinstall",
                           str(wheel)], **options)
    assert done.returncode == 0, done.stderr[-3000:]
    where = subprocess.run([str(folder / "bin" / "python"), "-c", "import custom; print(custom.__file__)"], **options)
    assert Path(where.stdout.strip()) == site / "custom" / "__init__.py"
    done = subprocess.run([str(folder / "bin" / "rt-dose-demo"), "out", "--shape", *SHAPE], **options)
    assert done.returncode == 0, done.stderr[-3000:]
    results = tmp_path / "out" / "results" / "hn_demo"
    assert {"RTDOSE.dcm", "dose.nii.gz", "report.html", "report.json"} <= {path.name for path in results.iterdir()}
    assert f"--config_file {site}/custom/bundle/configs/inference.json" in done.stdout
