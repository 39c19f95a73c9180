"""The benchmark names every part, writes its table, and asks for no particular speed."""

import json

import torch

from custom.benchmark import Benchmark, CascadeUNet, table


class Doubler(torch.nn.Module):
    def forward(self, image):
        return 2 * image[:, :1]


def test_every_part_is_timed_and_the_dose_is_what_is_written(tmp_path):
    written = []
    steps = {"reading": lambda d: {**d, "image": torch.full((3, 32, 16, 16), 0.5)}, "nothing": lambda d: d}
    found = Benchmark([{"image": "a"}, {"image": "b"}], steps, Doubler(), {"as shipped": lambda x, n: n(x)},
                      lambda d: written.append(d["pred"]), tmp_path, repeats=1).run()
    stages = ["reading", "nothing", "network, 1 step", "C3D-sized cascade", "1 step, contiguous, float32",
              "as shipped", "restoring and writing"]
    assert [row["stage"] for row in found] == stages
    record = json.loads((tmp_path / "benchmark.json").read_text())
    assert record["cases"] == 2 and [row["stage"] for row in record["stages"]] == stages
    assert next(row for row in found if row["stage"] == "network, 1 step")["ratio_to_1_step"] == 1.0
    assert all(row["seconds"] > 0 and row["peak_gb"] > 0.05 for row in found)
    assert len(written) == 2 and written[0].shape == (1, 32, 16, 16) and (written[0] == 1.0).all()
    assert table(found).count("\n") == len(stages) + 1
    assert [p.name for p in tmp_path.iterdir()] == ["benchmark.json"]


def test_the_yardstick_is_of_c3ds_size():
    """C3D has 32.35 million parameters (science.md A2)."""
    parameters = sum(p.numel() for p in CascadeUNet(38).parameters())
    assert 25e6 < parameters < 40e6
