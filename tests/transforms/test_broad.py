"""Samples for the broad branch: what is to be learnt of each block, and which case it is drawn from."""

import pytest
import torch
from monai.data import MetaTensor

from custom.networks.broad import BroadBranch, mean_of_blocks
from custom.transforms.broad import BroadSamplesd, RandBroadVoxelsd

SPATIAL = ["ct", "prescription", "sdm_Brainstem", "body", "plan_prior"]
CONTEXT = ["has_ct", "spacing_x", "spacing_y", "spacing_z", "has_Brainstem"]
SIZE = (12, 10, 8)


@pytest.fixture
def case() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    body = torch.zeros(1, *SIZE, dtype=torch.uint8)
    body[:, 2:-2, 2:-2] = 1
    image = torch.rand(len(SPATIAL), *SIZE) * body
    image[SPATIAL.index("body")] = body[0]
    return {"image": image.half(), "context": torch.tensor([1.0, 1.0, 1.0, 0.6, 1.0]), "body": body,
            "label": torch.rand(1, *SIZE).half()}


def variants(case, **options):
    branch = BroadBranch(SPATIAL, CONTEXT, width=4, members=1)
    return BroadSamplesd(branch, SPATIAL, CONTEXT, **options)(case)["variants"]


def test_what_is_learnt_is_the_reference_less_the_plan_in_every_block_of_the_body(case):
    found = variants(case, ct_prob=0.0, organ_prob=0.0)
    assert [v["less"] for v in found] == [False, False, True, True]
    dose = mean_of_blocks(case["label"].float() * case["body"])[0]
    plan = mean_of_blocks(case["image"][[-1]].float())[0]
    inside = mean_of_blocks(case["body"].float())[0] > 0
    assert torch.allclose(found[0]["residual"].float(), (dose - plan)[inside], atol=1e-3)
    assert (found[0]["weight"] == 1).all()
    mirrored = torch.flip(dose - plan, [0])[torch.flip(inside, [0])]
    assert torch.allclose(found[1]["residual"].float(), mirrored, atol=1e-3)
    for key in ("voxels", "patient"):  # nothing is left out with these probabilities
        assert torch.equal(found[0][key], found[2][key]) and torch.equal(found[1][key], found[3][key])


def test_samples_are_alike_with_metadata_and_without(case, tmp_path):
    """A case that was just prepared and one that was read again stand in one batch."""
    fresh = {key: MetaTensor(value) for key, value in case.items()}
    for kept, bare in zip(variants(fresh, folder=tmp_path), variants(case)):
        assert {key: type(value) for key, value in kept.items()} == {key: type(value) for key, value in bare.items()}
        assert torch.equal(kept["voxels"], bare["voxels"])
    assert len(list(tmp_path.iterdir())) == 1 and len(variants(case, folder=tmp_path)) == 4
    assert len(list(tmp_path.iterdir())) == 1


def test_less_input_is_left_out_of_the_second_pair_alone(case):
    whole, _, less, _ = variants(case, ct_prob=1.0, organ_prob=1.0)
    ct, brainstem = SPATIAL.index("ct"), SPATIAL.index("sdm_Brainstem")
    assert whole["voxels"][:, ct].abs().sum() > 0 and less["voxels"][:, ct].abs().sum() == 0
    assert (less["voxels"][:, brainstem] == -1).all()
    assert whole["patient"][[0, 4]].tolist() == [1, 1] and less["patient"][[0, 4]].tolist() == [0, 0]
    assert torch.equal(whole["residual"], less["residual"])


def test_single_voxels_stand_behind_the_blocks(case):
    apart = torch.randperm(case["label"].numel()) + 1.0  # values of the plan that tell the voxels apart, also in half
    case["image"][-1] = apart.reshape(SIZE).half() / 1024 * case["body"][0]
    blocks, both = variants(case), variants(case, single_voxels=2.0)
    assert torch.equal(both[0]["residual"], variants(case, single_voxels=2.0)[0]["residual"])
    dose, plan = case["label"][0].float(), case["image"][-1].float()
    found = {}
    for name, (few, more) in zip(("whole", "mirrored"), zip(blocks, both)):
        n = len(few["weight"])
        assert all(torch.equal(few[key], more[key][:n]) for key in ("voxels", "residual", "weight"))
        assert torch.equal(few["patient"], more["patient"])
        assert all(len(more[key]) == 3 * n for key in ("voxels", "residual", "weight"))
        assert (more["weight"][n:] == 1).all()
        given = more["voxels"][n:, SPATIAL.index("plan_prior")]
        found[name] = dict(zip(given.tolist(), more["residual"][n:].tolist()))
        for value, residual in found[name].items():
            x, y, z = (plan == value).nonzero()[0]
            assert residual == pytest.approx(float(dose[x, y, z]) - value, abs=1e-3)
    assert set(found["whole"]) != set(found["mirrored"])


def test_voxels_are_drawn_with_what_belongs_to_them(case):
    found = variants(case)
    draw = RandBroadVoxelsd(200)
    draw.set_random_state(0)
    for variant in found:
        drawn = draw({"variants": [variant]})
        assert drawn["voxels"].shape == (200, found[0]["voxels"].shape[1]) and drawn["voxels"].dtype == torch.float32
        row = {tuple(v.tolist()): r for v, r in zip(variant["voxels"].float(), variant["residual"].float().tolist())}
        assert all(row[tuple(v.tolist())] == r for v, r in zip(drawn["voxels"], drawn["residual"].tolist()))
        assert torch.equal(drawn["patient"], variant["patient"])


def test_kept_samples_are_the_same_and_are_not_made_again(case, tmp_path, monkeypatch):
    options = {"ct_prob": 0.5, "organ_prob": 0.5, "single_voxels": 1.0, "most_blocks": 9}
    fresh, kept = variants(case, **options), variants(case, **options, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1 and len(fresh[0]["weight"]) == 18
    with monkeypatch.context() as patched:
        patched.setattr(BroadSamplesd, "_sample", None)
        again = variants(case, **options, folder=tmp_path)
    for a, b, c in zip(fresh, kept, again):
        assert a["less"] == b["less"] == c["less"]
        keys = [key for key in a if key != "less"]
        assert all(torch.equal(a[key], b[key]) and torch.equal(a[key], c[key]) for key in keys)
    other = {**case, "label": case["label"] * 0.5}
    variants(other, **options, folder=tmp_path)
    variants(case, **options, seed=1, folder=tmp_path)
    branch = BroadBranch(SPATIAL, CONTEXT, width=4, members=1, scales_mm=(7.0,))
    BroadSamplesd(branch, SPATIAL, CONTEXT, **options, folder=tmp_path)(case)
    assert len(list(tmp_path.iterdir())) == 4, "another dose, seed or feature has another file"


def test_samples_that_could_not_be_made_leave_no_file(case, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda data, path: (path.write_bytes(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        variants(case, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_fewer_blocks_are_drawn_from_all(case):
    every, few = variants(case), variants(case, most_blocks=10)
    assert [len(v["weight"]) for v in few] == [10] * 4
    rows = {tuple(row) for row in torch.cat([every[0]["voxels"], every[0]["residual"][:, None]], dim=1).tolist()}
    assert {tuple(r) for r in torch.cat([few[0]["voxels"], few[0]["residual"][:, None]], dim=1).tolist()} <= rows
    assert torch.equal(few[0]["patient"], every[0]["patient"])
