"""The bundle behind MONAI Label's server, asked over HTTP as a viewer does; in MONAI Label's own environment.

``make test-label`` builds that environment and runs this file. ``$DOSE_LABEL_PYTHON`` names its interpreter; by default
it is ``.venv-label/bin/python``.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from custom.io import read_case
from custom.phantom import make_case, write_study

ROOT = Path(__file__).resolve().parents[1]
PYTHON = Path(os.environ.get("DOSE_LABEL_PYTHON") or ROOT / ".venv-label" / "bin" / "python")
NAME = "rt_ct_dose_prediction"
DEAD_END = "http://127.0.0.1:9"  # a proxy that is not there: whoever asks the network fails

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason=f"no MONAI Label environment at {PYTHON}: make test-label"),
    pytest.mark.skipif(not (ROOT / "bundle" / "models" / "model.pt").is_file(), reason="no trained weights"),
]


def environment() -> dict[str, str]:
    offline = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), DEAD_END)
    return {**os.environ, **offline, "no_proxy": "", "PYTHONPATH": str(ROOT)}


def make_app(*arguments: object) -> subprocess.CompletedProcess:
    command = [str(PYTHON), str(ROOT / "apps" / "label" / "make_app.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1800)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A coarse synthetic patient as DICOM, without a dose."""
    case = make_case("HeadNeck", 3, shape=(48, 48, 24))
    return write_study(case, tmp_path_factory.mktemp("dicom") / "patient_3", patient_id="LABEL_3")


class Server:
    """MONAI Label on a free port, and requests to it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = folder / "server.log"
        self.studies = folder / "studies"
        command = ["make", "label-server", f"LABEL_VENV={PYTHON.parents[1]}", f"LABEL_APP={folder / 'app'}",
                   f"LABEL_STUDIES={self.studies}", f"LABEL_PORT={self.port}"]
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=stream, stderr=stream,
                                            start_new_session=True)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def get(self, path: str) -> bytes:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(self.url(path), timeout=120) as answer:
            return answer.read()

    def infer(self, image: object, output: str, **params: object) -> bytes:
        """POST /infer; ``params`` as a viewer sends its options."""
        query = urllib.parse.urlencode({"image": str(image), "output": output})
        form = urllib.parse.urlencode({"params": json.dumps(params)}).encode()
        request = urllib.request.Request(self.url(f"/infer/{NAME}?{query}"), data=form, method="POST")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=1800) as answer:
            return answer.read()

    def wait(self) -> None:
        deadline = time.monotonic() + 1800
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("/info/")
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(1.0)
            else:
                return
        raise AssertionError(f"the server did not start:\n{self.log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def server(study, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("label")
    for arguments in (("app", folder / "app"), ("add", folder / "studies", study)):
        done = make_app(*arguments)
        assert done.returncode == 0, done.stderr[-3000:]
    running = Server(folder)
    try:
        running.wait()
        yield running
    finally:
        os.killpg(running.process.pid, 15)
        running.process.wait(timeout=60)


def volume(content: bytes, folder: Path, name: str = "answer.nii.gz") -> nib.Nifti1Image:
    path = folder / name
    path.write_bytes(content)
    return nib.load(path)


def test_info_names_the_model_its_isodoses_and_its_options(server):
    info = json.loads(server.get("/info/"))
    assert list(info["models"]) == [NAME]
    model = info["models"][NAME]
    assert list(model["labels"]) == [f"isodose {share} %" for share in (20, 50, 80, 95, 100, 107)]
    assert list(model["labels"].values()) == [1, 2, 3, 4, 5, 6]
    config = model["config"]
    assert config["num_inference_steps"] == 1 and config["num_samples"] == 1
    assert config["technique"] == ["from the files", "IMRT", "VMAT"]
    assert config["model_filename"] == ["model.pt"]


@pytest.fixture(scope="module")
def dose(server, study, tmp_path_factory) -> nib.Nifti1Image:
    return volume(server.infer(study, "image", result_extension=".nii.gz"), tmp_path_factory.mktemp("dose"))


def test_a_dicom_folder_gives_the_dose_in_gy_on_its_ct(dose, study, tmp_path):
    """The same as the bundle's runner gives, whose own tests hold the dose itself."""
    assert dose.get_data_dtype() == np.float32
    case = read_case(study)
    assert dose.shape == case.grid.shape
    np.testing.assert_allclose(dose.affine, case.grid.ras_affine, atol=1e-3)
    config = ROOT / "bundle" / "configs" / "inference.json"
    command = [sys.executable, "-m", "monai.bundle", "run", "inference", "--config_file", str(config),
               "--dataset_dir", str(study), "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    (expected,) = tmp_path.glob("*/dose.nii.gz")
    error = np.abs(dose.get_fdata() - nib.load(expected).get_fdata())  # other versions of numpy and pydicom
    assert error.max() < 0.3 and error.mean() < 0.01
    assert dose.get_fdata().max() > 60.0


def test_integers_are_isodose_bands(server, study, dose, tmp_path):
    """What 3D Slicer asks for: uint8 in NRRD; band k begins at level k."""
    content = server.infer(study, "image", result_extension=".nrrd", result_dtype="uint8")
    header, values = read_nrrd(content)
    assert header["type"] in ("unsigned char", "uint8")
    labels = values.reshape([int(n) for n in header["sizes"].split()], order="F")
    levels = np.array([0.2, 0.5, 0.8, 0.95, 1.0, 1.07]) * max(read_case(study).prescription_gy.values())
    expected = np.digitize(dose.get_fdata(), levels)
    assert set(np.unique(labels)) >= {0, 1, 2, 3}
    assert (labels != expected).mean() < 1e-4  # a voxel on a level may fall on either side


SLICER = """
import json, sys
from monailabel.client import MONAILabelClient
url, image, model, folder = sys.argv[1:]
client = MONAILabelClient(url, tmpdir=folder)
config = client.info()["models"][model]["config"]
params = {k: v[0] if isinstance(v, list) else v for k, v in config.items()}
params.update({"result_extension": ".nrrd", "result_dtype": "uint8"})
file, answer = client.infer(model, image, params)
labels = [k for k, _ in sorted(answer["label_names"].items(), key=lambda item: item[1])]
print(json.dumps({"file": file, "labels": labels, "levels_gy": answer["levels_gy"]}))
"""


def test_slicers_client_gets_named_segments(server, dose, tmp_path):
    """MONAI Label's client, called with what its Slicer module sends when no option was touched (MONAILabel.py)."""
    (name,) = (path.name.removesuffix(".nii.gz") for path in server.studies.glob("*.nii.gz"))
    env = {**environment(), "http_proxy": "", "HTTP_PROXY": ""}
    done = subprocess.run([str(PYTHON), "-c", SLICER, server.url(""), name, NAME, str(tmp_path)], env=env,
                          capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["labels"] == [f"isodose {share} %" for share in (20, 50, 80, 95, 100, 107)]
    header, values = read_nrrd(Path(answer["file"]).read_bytes())
    labels = values.reshape([int(n) for n in header["sizes"].split()], order="F")
    assert (labels != np.digitize(dose.get_fdata(), answer["levels_gy"])).mean() < 1e-4


def test_the_viewers_volume_stands_for_its_study(server, dose, tmp_path):
    """Slicer opens NAME.nii.gz of the datastore and asks by that name; the study beside it is predicted."""
    (name,) = (path.name.removesuffix(".nii.gz") for path in server.studies.glob("*.nii.gz"))
    assert name in json.loads(server.get("/datastore/?output=all"))["objects"]
    answer = volume(server.infer(name, "image", result_extension=".nii.gz"), tmp_path)
    np.testing.assert_allclose(answer.get_fdata(), dose.get_fdata(), atol=1e-3)


def test_the_answer_says_what_it_means(server, study):
    answer = json.loads(server.infer(study, "json", result_extension=".nii.gz", result_dtype="uint8"))
    assert answer["content"] == "isodose bands"
    highest = max(answer["prescription_gy"].values())
    np.testing.assert_allclose(answer["levels_gy"], np.array([0.2, 0.5, 0.8, 0.95, 1.0, 1.07]) * highest, atol=1e-3)
    assert answer["max_dose_gy"] > 0.9 * highest


def test_options_of_the_viewer_reach_the_prediction(server, study, dose, tmp_path):
    options = {"num_inference_steps": 2, "num_samples": "2", "technique": "from the files", "prescription_gy": "60"}
    answer = volume(server.infer(study, "image", result_extension=".nii.gz", **options), tmp_path)
    assert 0.7 < answer.get_fdata().max() / dose.get_fdata().max() < 0.95  # 60 Gy instead of 70
    log = server.log.read_text()
    assert "'num_inference_steps': 2, 'num_samples': 2" in log
    again = volume(server.infer(study, "image", result_extension=".nii.gz"), tmp_path, "again.nii.gz")
    np.testing.assert_allclose(again.get_fdata(), dose.get_fdata(), atol=1e-3)  # options of one request stay with it


def test_a_study_that_cannot_be_read_is_refused_with_the_reason(server, tmp_path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.infer(tmp_path, "image", result_extension=".nii.gz")
    assert refused.value.code == 422
    assert "no RTSTRUCT" in json.loads(refused.value.read())["detail"]


def test_the_curl_commands_of_the_page(server, tmp_path):
    """As they stand in the docs, but for the port and the study's name."""
    page = (ROOT / "bundle" / "docs" / "using_slicer_and_label.md").read_text(encoding="utf-8")
    (name,) = (path.name.removesuffix(".nii.gz") for path in server.studies.glob("*.nii.gz"))
    commands = re.findall(r"^curl .*", page, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        command = command.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}").replace("image=NAME", f"image={name}")
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr
    assert NAME in done.stdout
    assert nib.load(tmp_path / "dose.nii.gz").get_fdata().max() > 60.0


def test_levels_of_ones_own(tmp_path):
    done = make_app("app", tmp_path, "--levels", 0.3, 1.0)
    assert done.returncode == 0, done.stderr[-3000:]
    configs = tmp_path / "monaibundle" / "model" / NAME / "configs"
    output = json.loads((configs / "metadata.json").read_text())["network_data_format"]["outputs"]["pred"]
    assert output["channel_def"] == {"0": "background", "1": "isodose 30 %", "2": "isodose 100 %"}
    transforms = json.loads((configs / "inference.json").read_text())["postprocessing"]["transforms"]
    assert transforms[-1] == {"_target_": "custom.transforms.viewer.IsodoseLabeld", "levels": [0.3, 1.0]}


def test_a_study_is_added_once(study, tmp_path):
    assert make_app("add", tmp_path, study).returncode == 0
    again = make_app("add", tmp_path, study)
    assert again.returncode == 1 and "there is a study of this name" in again.stderr


def read_nrrd(content: bytes) -> tuple[dict[str, str], np.ndarray]:
    """Header and flat values of a one-byte NRRD (nrrd format, section 'Basic example')."""
    text, _, data = content.partition(b"\n\n")
    lines = [line for line in text.decode().splitlines()[1:] if not line.startswith("#") and ":" in line]
    header = {key.strip(): value.lstrip("=").strip() for key, value in (line.split(":", 1) for line in lines)}
    raw = gzip.decompress(data) if header["encoding"] == "gzip" else data
    return header, np.frombuffer(raw, dtype=np.uint8)
