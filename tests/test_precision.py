"""bfloat16 where the device has instructions for it."""

import pytest
import torch

from custom.precision import fast_dtype


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
