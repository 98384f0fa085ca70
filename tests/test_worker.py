"""What a worker decides without Ray: precision and kernels."""

from __future__ import annotations

import pytest
import torch

from msrn_ray.config import ModelSettings
from msrn_ray.model import build_model, choose_attention_kernels
from msrn_ray.worker import amp_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, None),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, None),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_precision_of_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: torch.dtype | None
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert amp_dtype("auto", CPU) == expected
    assert (amp_dtype("bf16", CPU), amp_dtype("fp16", CPU), amp_dtype("off", CPU)) == (
        torch.bfloat16,
        torch.float16,
        None,
    )


def test_a_torch_that_does_not_tell_what_the_cpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert amp_dtype("auto", CPU) is None


def test_kernels_follow_the_settings() -> None:
    settings = ModelSettings(backbone="resnet10", pretrained=None, head="elementwise", embed_dim=8, compile="off")
    vectors, mask = torch.randn(3, 4), torch.eye(3, dtype=torch.bool)
    assert (
        choose_attention_kernels(build_model(settings, vectors, mask), settings, CPU, 0)
        == "attention kernels tile by tile"
    )
    gap = settings.model_copy(update={"name": "gap"})
    assert choose_attention_kernels(build_model(gap, vectors, mask), gap, CPU, 0) == ""
