"""Turned crops on volumes whose turned values are known."""

import numpy as np
import pytest
import torch

from custom.transforms.rotate import RandTurnedCropd, turned_beams, turned_crop


@pytest.fixture
def volume():
    """Channels: the distance from the axis through (20, 25), a linear ramp along i, and one along k."""
    i, j, k = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in (40, 50, 9)), indexing="ij")
    return torch.stack([((i - 20) ** 2 + (j - 25) ** 2).sqrt(), i, k])


def test_no_turn_is_a_plain_crop_with_zeros_outside(volume):
    patch = turned_crop(volume, (3, 25, 4), (16, 12, 5), 0.0, nearest=False)
    assert torch.equal(patch[:, 5:], volume[:, 0:11, 19:31, 2:7])
    assert not patch[:, :5].any()
    assert torch.equal(turned_crop(volume, (3, 25, 4), (16, 12, 5), 360.0, nearest=False), patch)


@pytest.mark.parametrize("angle", [40.0, 80.0, 200.0])
def test_a_turn_about_the_centre(volume, angle):
    """What depends on the distance stays, a ramp along i becomes one along the turned direction, k is not touched."""
    patch = turned_crop(volume, (20, 25, 4), (21, 25, 5), angle, nearest=False)
    i, j = torch.meshgrid(torch.arange(21.0) - 10, torch.arange(25.0) - 12, indexing="ij")
    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    np.testing.assert_allclose(patch[1, :, :, 0], 20 + c * i - s * j, atol=2e-3)
    np.testing.assert_allclose(patch[2, 0, 0], [2, 3, 4, 5, 6], atol=1e-4)
    far = (i**2 + j**2).sqrt() > 2  # linear interpolation rounds the cone's tip off
    np.testing.assert_allclose(patch[0, :, :, 2][far], (i**2 + j**2).sqrt()[far], atol=0.07)


def test_quarter_turn_is_exact_and_labels_stay_labels(volume):
    labels = (volume[:1] < 7).to(torch.uint8)
    patch = turned_crop(labels, (20, 25, 4), (15, 15, 5), 90.0, nearest=True)
    # turned by 90 degrees: patch(i, j) = volume(-j, i)
    expected = labels[:, 13:28, 18:33, 2:7].flip(1).transpose(1, 2)
    assert patch.dtype == torch.uint8 and torch.equal(patch, expected)
    turned = turned_crop(labels, (20, 25, 4), (15, 15, 5), 40.0, nearest=True)
    assert set(turned.unique().tolist()) <= {0, 1}


def test_all_keys_turn_alike_and_as_often_as_asked(volume):
    body = (volume[:1] < 12).to(torch.uint8)
    data = {"image": volume.half(), "label": volume[:1] * 2, "body": body}
    transform = RandTurnedCropd(["image", "label", "body"], ["body"], "body", (12, 12, 5), 40.0, prob=0.5)
    transform.set_random_state(0)
    turned = 0
    for _ in range(60):
        (out,) = transform(data)
        assert out["image"].shape == (3, 12, 12, 5) and out["image"].dtype == torch.float16
        assert out["body"].dtype == torch.uint8 and out["body"][0, 6, 6, 2] == 1  # the centre lies in the body
        np.testing.assert_allclose(out["label"][0], 2 * out["image"][0].float(), atol=0.1)
        turned += int(out["image"][1, 0, 0, 2] != out["image"][1, 0, 1, 2])  # the ramp along i leans
    assert 18 <= turned <= 42


def test_whole_axes_and_several_patches(volume):
    data = {"image": volume, "body": torch.ones_like(volume[:1])}
    transform = RandTurnedCropd(["image", "body"], ["body"], "body", (-1, -1, 1), prob=0.0, num_samples=3)
    transform.set_random_state(0)
    patches = transform(data)
    assert len(patches) == 3
    for patch in patches:
        planes = [k for k in range(volume.shape[3]) if torch.equal(patch["image"][..., 0], volume[..., k])]
        assert len(planes) == 1 and patch["image"].shape == (*volume.shape[:3], 1)


def test_patches_stay_within_the_volume_where_they_fit(volume):
    data = {"image": volume + 1000, "body": torch.ones_like(volume[:1])}
    x, y, z = volume.shape[1:]
    transform = RandTurnedCropd(["image", "body"], ["body"], "body", (x - 4, y + 6, z), prob=0.0, num_samples=8)
    transform.set_random_state(0)
    for patch in transform(data):
        inside = patch["body"][0] > 0
        assert inside.sum() == (x - 4) * y * z and inside[:, 3:-3].all()  # in the middle of the axis that is too short


@pytest.mark.parametrize("edges", [(0.9, 1.2), (1.1, 0.8)])
def test_other_voxel_edges(volume, edges):
    """Ramps keep their value at the centre and rise by the patch's edge; the distance from the axis grows with it."""
    patch = turned_crop(volume, (20, 25, 4), (15, 15, 5), 40.0, nearest=False, edges=edges)
    i, j = torch.meshgrid(torch.arange(15.0) - 7, torch.arange(15.0) - 7, indexing="ij")
    c, s = np.cos(np.deg2rad(40)), np.sin(np.deg2rad(40))
    np.testing.assert_allclose(patch[1, :, :, 2], 20 + edges[0] * (c * i - s * j), atol=2e-3)
    np.testing.assert_allclose(patch[2, 3, 9], 4 + edges[1] * (torch.arange(5.0) - 2), atol=1e-4)
    distance = edges[0] * (i**2 + j**2).sqrt()
    np.testing.assert_allclose(patch[0, :, :, 1][distance > 2], distance[distance > 2], atol=0.07)


def test_labels_stay_labels_on_other_edges(volume):
    """A ball keeps its volume in voxels of the volume, and its voxels are 0 or 1."""
    x = torch.stack(torch.meshgrid(*(torch.arange(41.0) - 20 for _ in range(3)), indexing="ij"))
    ball = (x.square().sum(0, keepdim=True) < 14**2).to(torch.uint8)
    patch = turned_crop(ball, (20, 20, 20), (41, 41, 41), 40.0, nearest=True, edges=(0.85, 1.1))
    assert patch.dtype == torch.uint8 and set(patch.unique().tolist()) == {0, 1}
    assert float(patch.sum() * 0.85**2 * 1.1) == pytest.approx(float(ball.sum()), rel=0.01)


def test_turned_patches_vary_within_what_was_asked_and_tell_their_spacing(volume):
    ramp = torch.stack([volume[1], volume[2] * 10])
    body = torch.zeros_like(volume[:1])
    body[..., 3:6] = 1  # patches around it lie within the volume
    data = {"image": ramp, "body": body, "voxel_cc": torch.tensor(0.04),
            "context": torch.tensor([1.0, 0.9, 0.9, 0.6])}
    names = ["has_ct", "spacing_x", "spacing_y", "spacing_z"]
    transform = RandTurnedCropd(["image", "body"], ["body"], "body", (6, 6, 3), 90.0, prob=1.0, jitter_deg=5.0,
                                edge_change=0.1, context_channels=names)
    transform.set_random_state(0)
    quarter, seen = set(), []
    for _ in range(60):
        (out,) = transform(data)
        has_ct, x, y, z = out["context"].tolist()
        along_i, along_j = (float(out["image"][0, a, b, 1] - out["image"][0, 2, 2, 1]) for a, b in ((3, 2), (2, 3)))
        edge = float(np.hypot(along_i, along_j))  # a turned ramp still rises by one edge of the patch
        assert has_ct == 1 and x == y == pytest.approx(0.9 * edge, rel=1e-3)
        assert float(out["image"][1, 2, 2, 1] - out["image"][1, 2, 2, 0]) == pytest.approx(10 * z / 0.6, rel=1e-3)
        assert float(out["voxel_cc"]) == pytest.approx(0.04 * edge**2 * z / 0.6, rel=1e-3)
        angle = np.rad2deg(np.arctan2(-along_j, along_i))
        quarter.add(round(angle / 90) % 4)
        seen.append((abs(angle - 90 * round(angle / 90)), edge))
    away, edges = np.array(seen).T
    assert quarter == {0, 1, 2, 3} and 4 < away.max() <= 5.01
    assert 0.9 <= edges.min() < 0.92 and 1.08 < edges.max() <= 1.1
    assert data["context"][1] == 0.9 and data["voxel_cc"] == 0.04  # the case itself is left alone


def rays(shape=(61, 61, 3), centre=30) -> tuple[list[str], torch.Tensor]:
    """The channels ``plan_beam_0`` to ``plan_beam_320``, each a ray from the centre towards its source."""
    names, volume = [], torch.zeros(9, *shape)
    for n, angle in enumerate(range(0, 360, 40)):
        names.append(f"plan_beam_{angle}")
        for r in np.linspace(0, 25, 200):  # the axes are LPS: gantry 0 is anterior, towards -y; 90 to the left, +x
            volume[n, round(centre + r * np.sin(np.deg2rad(angle))), round(centre - r * np.cos(np.deg2rad(angle)))] = 1
    return names, volume


@pytest.mark.parametrize("angle", [40.0, 160.0, 320.0, 85.0, -7.0])
def test_beams_keep_the_direction_they_are_named_after(angle):
    names, volume = rays()
    turned = turned_crop(volume, (30, 30, 1), (61, 61, 3), angle, nearest=True)[turned_beams(names, angle)]
    i, j = torch.meshgrid(torch.arange(61.0) - 30, torch.arange(61.0) - 30, indexing="ij")
    for n, gantry in enumerate(range(0, 360, 40)):
        ray = turned[n, :, :, 1]
        found = np.rad2deg(np.arctan2(float((ray * i).sum()), float(-(ray * j).sum())))
        away = (found - gantry + 180) % 360 - 180
        expected = (angle + 20) % 40 - 20  # what a sector cannot follow
        assert away == pytest.approx(-expected, abs=2.0)


def test_other_channels_keep_their_places():
    assert turned_beams(["ct", "plan_beam_0", "plan_prior"], 80.0) == [0, 1, 2]  # one that is not given stays
    assert turned_beams(["plan_beam_0", "body", "plan_beam_40"], 40.0) == [2, 1, 2]
    assert turned_beams(["a", "b"], 200.0) == [0, 1]
