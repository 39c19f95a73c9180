"""Which cases go where: by OpenKBP's folders, or by a hash that adding cases does not change."""

from __future__ import annotations

from pathlib import Path

import pytest

from custom import places
from custom.case import CaseError
from custom.datalists import bundle_root, list_cases, prepare, split_cases


def openkbp(root: Path, *folders: str) -> Path:
    """Empty OpenKBP patients: what makes a folder one is which files it holds."""
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in ("possible_dose_mask.csv", "voxel_dimensions.csv"):
            (root / folder / name).write_text("")
    return root


def names(cases) -> list[str]:
    return [Path(case["image"]).name for case in cases]


def test_openkbps_folders_decide(tmp_path):
    openkbp(tmp_path, "provided-data/train-pats/pt_1", "provided-data/train-pats/pt_2",
            "provided-data/validation-pats/pt_201", "provided-data/test-pats/pt_241")
    assert names(split_cases(tmp_path, "train")) == ["pt_1", "pt_2"]
    assert names(split_cases(tmp_path, "validation")) == ["pt_201"]
    assert names(split_cases(tmp_path, "train", limit=1)) == ["pt_1"]
    assert names(list_cases(tmp_path)) == ["pt_241", "pt_1", "pt_2", "pt_201"]
    assert all(set(case) == {"image"} and Path(case["image"]).is_dir() for case in list_cases(tmp_path))


def test_extra_folders_join_the_training_alone(tmp_path):
    openkbp(tmp_path / "real", "train-pats/pt_1", "validation-pats/pt_201")
    openkbp(tmp_path / "synthetic", "lung_1", "lung_2")
    extra = {"extra_dirs": [tmp_path / "synthetic"]}
    assert names(split_cases(tmp_path / "real", "train", limit=1, **extra)) == ["pt_1", "lung_1", "lung_2"]
    assert names(split_cases(tmp_path / "real", "validation", **extra)) == ["pt_201"]


def test_each_fold_leaves_out_its_own_training_cases_and_no_extra_ones(tmp_path):
    openkbp(tmp_path / "real", "train-pats/pt_1", "train-pats/pt_2", "train-pats/pt_3", "validation-pats/pt_201")
    openkbp(tmp_path / "more", "lung_1")
    folds = {"folds": 2, "extra_dirs": [tmp_path / "more"]}
    assert names(split_cases(tmp_path / "real", "train", fold=0, **folds)) == ["pt_2", "lung_1"]
    assert names(split_cases(tmp_path / "real", "train", fold=1, **folds)) == ["pt_1", "pt_3", "lung_1"]
    assert names(split_cases(tmp_path / "real", "validation", fold=1, **folds)) == ["pt_201"]
    with pytest.raises(CaseError, match="fold 2; expected 0 to 1 of 2 folds"):
        split_cases(tmp_path / "real", "train", fold=2, **folds)


def test_hash_splits_without_overlap_and_stays_when_cases_are_added(tmp_path):
    openkbp(tmp_path, *(f"case_{n:03d}" for n in range(60)))
    train, validation = (set(names(split_cases(tmp_path, part))) for part in ("train", "validation"))
    assert len(train) + len(validation) == 60 and not train & validation and 3 <= len(validation) <= 18
    openkbp(tmp_path, *(f"added_{n:03d}" for n in range(60)))
    more_train, more_validation = (set(names(split_cases(tmp_path, part))) for part in ("train", "validation"))
    assert train < more_train and validation < more_validation
    half = names(split_cases(tmp_path, "validation", validation_share=0.5))
    assert validation < set(half) and 40 <= len(half) <= 80


def test_hash_takes_the_cases_name_not_a_folder_that_all_have(tmp_path):
    openkbp(tmp_path / "plain", *(f"case_{n:03d}" for n in range(40)))
    openkbp(tmp_path / "deep", *(f"case_{n:03d}/dicom" for n in range(40)))
    plain, deep = (split_cases(tmp_path / name, "validation") for name in ("plain", "deep"))
    assert [Path(c["image"]).parent.name for c in deep] == [Path(c["image"]).name for c in plain] and plain


@pytest.mark.parametrize(("folders", "part"), [
    (["train-pats/pt_1"], "validation"), (["validation-pats/pt_201"], "train"), (["one"], None),
])
def test_empty_part_is_an_error(tmp_path, folders, part):
    openkbp(tmp_path, *folders)
    for name in [part] if part else ["train", "validation"]:
        try:
            found = split_cases(tmp_path, name)
        except CaseError as error:
            assert f"found 1 cases but none for {name}" in str(error) and "train-pats" in str(error)
        else:
            assert part is None and len(found) == 1  # the only case is in one of the parts
    if part is None:
        with pytest.raises(CaseError, match="none for train"):
            split_cases(tmp_path, "train", validation_share=1.0)


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(CaseError, match="nowhere: there is no such file or folder"):
        split_cases(tmp_path / "nowhere", "train")
    with pytest.raises(CaseError, match="no case found"):
        list_cases(tmp_path)


def test_bundle_root_in_the_repository_in_an_assembled_bundle_and_in_a_wheel(tmp_path, monkeypatch):
    assert (Path(bundle_root()) / "configs" / "metadata.json").is_file()
    monkeypatch.setattr(places, "__file__", str(tmp_path / "custom" / "places.py"))
    assert bundle_root() == str(tmp_path / "bundle")
    (tmp_path / "configs").mkdir()
    assert bundle_root() == str(tmp_path)
    (tmp_path / "custom" / "bundle" / "configs").mkdir(parents=True)
    assert bundle_root() == str(tmp_path / "custom" / "bundle")


def test_prepare_reads_every_case_once():
    read = []

    class Cases(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    prepare([Cases("abc"), Cases("d")], num_workers=0)
    assert read == [0, 1, 2, 0]


def test_cases_of_one_name_get_names_of_their_own(tmp_path):
    openkbp(tmp_path, "a/pt_1", "b/pt_1", "b/PT_2", "c/pt_2", "c/pt_3")
    found = {Path(case["image"]).relative_to(tmp_path).as_posix(): case.get("case_name") for case in
             list_cases(tmp_path)}
    assert found == {"a/pt_1": "a_pt_1", "b/pt_1": "b_pt_1", "b/PT_2": "b_PT_2", "c/pt_2": "c_pt_2", "c/pt_3": None}


def test_deeper_folders_tell_apart_what_their_parents_do_not(tmp_path):
    openkbp(tmp_path, "x/plan/pt_1", "y/plan/pt_1", "y_plan/pt_1")
    names = [case["case_name"].lower() for case in list_cases(tmp_path)]
    assert len(set(names)) == 3 and all(name.endswith("pt_1") for name in names)


def test_cases_with_a_report_are_left_out_on_demand(tmp_path):
    data, out = openkbp(tmp_path / "data", "pt_1", "pt_2"), tmp_path / "out"
    (out / "pt_1").mkdir(parents=True)
    assert len(list_cases(data, done_in=out)) == 2, "a folder without a report is not done"
    (out / "pt_1" / "report.json").write_text("{}")
    assert names(list_cases(data, done_in=out)) == ["pt_2"] and len(list_cases(data)) == 2
    (out / "pt_2").mkdir()
    (out / "pt_2" / "report.json").write_text("{}")
    with pytest.raises(CaseError, match="all 2 cases have a report.*skip_done"):
        list_cases(data, done_in=out)
