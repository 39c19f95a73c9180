"""GDP-HMM files, written here in the public layout; and files that would run code."""

from __future__ import annotations

import os

import numpy as np
import pytest

from custom.case import CaseError
from custom.io import find_cases, read_case

SHAPE = (20, 24, 28)  # z, y, x


def write_plan(path, **changes):
    z, y, x = np.indices(SHAPE)
    body = ((y - 12) ** 2 + (x - 14) ** 2 < 100).astype(np.uint8)

    def block(*centre):
        return (np.abs(np.stack([z, y, x]) - np.reshape(centre, (3, 1, 1, 1))).max(axis=0) <= 2).astype(np.uint8)

    content = {
        "img": np.full(SHAPE, -50, np.int16), "dose": np.uint16(1000) * block(10, 12, 14), "dose_scale": 0.07,
        "isVMAT": False, "isocenter": [10.0, 12.0, 14.0], "angle_list": [0.0, 72.0, 144.0], "Body": body,
        "angle_plate": np.zeros(SHAPE[1:]), "beam_plate": np.zeros(SHAPE), "PTVHighOPT": block(10, 12, 14),
        "PTVMid": block(12, 12, 14), "RingPTVHigh": block(10, 12, 12), "SpinalCord_05": block(10, 18, 14),
        "ParotidIps-PTV": block(10, 12, 20), "ParotidCon-PTV": block(10, 12, 8), "Larynx-PTV": block(4, 12, 14),
        "Chiasim": block(16, 12, 14), "all_mask": ["Body"], **changes,
    }
    np.savez_compressed(path, {k: v for k, v in content.items() if v is not None})
    return path


LEVELS = {"PTVHighOPT": 70, "PTVMid": 60}


def test_layout(tmp_path):
    case = read_case(write_plan(tmp_path / "0617+A+MOS_1.npz"), prescription_gy=LEVELS)
    assert case.grid.shape == SHAPE[::-1]
    np.testing.assert_allclose(case.grid.spacing_mm, (2.5, 2.5, 2.0))
    assert case.prescription_gy == {"PTV_High": 70.0, "PTV_Mid": 60.0}
    assert case.dose_gy.max() == pytest.approx(70) and case.dose_gy[14, 12, 10] == pytest.approx(70)
    assert case.beams[0].isocenter_mm == (14 * 2.5, 12 * 2.5, 10 * 2.0)
    assert [b.gantry_deg for b in case.beams] == [(0.0,), (72.0,), (144.0,)]
    assert {"Parotid_L", "Parotid_R", "SpinalCord", "Larynx", "OpticChiasm"} <= set(case.masks)
    assert case.masks["Parotid_L"][20, 12, 10] and case.masks["Parotid_R"][8, 12, 10]
    assert (case.name, case.technique, case.site) == ("0617+A+MOS_1", "IMRT", "HeadNeck")
    assert any("Larynx-PTV" in n for n in case.source["notes"])


def test_early_spellings_and_vmat(tmp_path):
    early = {"BODY": np.ones(SHAPE, np.uint8), "Body": None, "isVMAT": True, "dose": None, "spacing": (3.0, 3.0, 2.0),
             "ParotidIps-PTV": None, "ParotdIps-PTV": np.eye(28)[None, :24].repeat(20, 0)}
    case = read_case(write_plan(tmp_path / "a.npz", **early), prescription_gy=70)
    assert case.technique == "VMAT" and len(case.beams) == 1 and case.beams[0].is_arc
    assert case.dose_gy is None and case.body.all() and {"Parotid_L", "Parotid_R"} & set(case.masks)
    np.testing.assert_allclose(case.grid.spacing_mm, (3.0, 3.0, 2.0))


def test_found_in_a_folder_and_without_prescription(tmp_path):
    (tmp_path / "train").mkdir()
    path = write_plan(tmp_path / "train" / "a.npz")
    np.savez(tmp_path / "train" / "other.npz", x=np.zeros(3))
    assert find_cases(tmp_path) == [path]
    with pytest.raises(CaseError, match="no prescription"):
        read_case(path)


class Harmful:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("content", [{"img": Harmful()}, Harmful(), np.zeros(3)])
def test_files_cannot_run_code(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "a.npz", np.array(content, dtype=object) if not isinstance(content, np.ndarray) else content)
    with pytest.raises(CaseError, match="a.npz"):
        read_case(tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()
