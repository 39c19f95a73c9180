"""bfloat16 where the device has instructions for it; compiled parts of a network."""

import copy

import pytest
import torch

from custom.case import CaseError
from custom.precision import compile_parts, fast_dtype


@pytest.mark.parametrize(("avx512_bf16", "amx", "dtype"), [(False, False, None), (True, False, "bfloat16"),
                                                           (False, True, "bfloat16")])
def test_a_processor_is_asked_for_its_instructions(monkeypatch, avx512_bf16, amx, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert fast_dtype("cpu") == dtype
    assert fast_dtype(torch.device("cuda:0")) == "bfloat16"


def test_a_torch_that_cannot_tell_computes_in_float32(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert fast_dtype("cpu") is None


class Doubled(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_compiled_part_computes_the_same_under_the_same_names():
    network = torch.nn.Sequential(Doubled(3, 4), torch.nn.Tanh())
    x, names = torch.rand(2, 3), list(network.state_dict())
    before, seen = network(x), []

    def backend(graph, _):
        seen.append(graph)
        return graph.forward

    compile_parts(network, {"0": {"backend": backend}})
    assert torch.equal(network(x), before) and len(seen) == 1
    assert list(network.state_dict()) == names
    assert torch.equal(copy.deepcopy(network)(x), before) and len(seen) == 1


def test_an_unknown_part_is_told():
    network = torch.nn.Sequential(torch.nn.Linear(3, 4))
    with pytest.raises(CaseError, match=r"compiled: \['priro'\] are no parts of the network; expected some of \['0'\]"):
        compile_parts(network, {"priro": {}})
