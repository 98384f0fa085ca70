"""The forms of semantic attention that tests compare: the definition, tiles, compiled kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from msrn_ray.model import semantic_attention
from msrn_ray.model.semantic_attention import SemanticAttention


@cache
def compiler() -> str | None:
    """Return why nothing can be compiled on this machine, or None."""
    attention = SemanticAttention()
    chosen = attention.choose_kernels("auto", torch.device("cpu"))
    return None if attention.compiled else chosen


def tiled(features: Tensor, semantics: Tensor) -> Tensor:
    """Run tile by tile."""
    return semantic_attention(features, semantics)


def compiled(features: Tensor, semantics: Tensor) -> Tensor:
    """Run compiled kernels, or skip the test where nothing compiles."""
    reason = compiler()
    if reason:
        pytest.skip(reason)
    return semantic_attention(features, semantics, compiled=True)


Attention = Callable[[Tensor, Tensor], Tensor]
both = pytest.mark.parametrize("attention", [tiled, compiled])


def direct(features: Tensor, semantics: Tensor) -> Tensor:
    """Return the definition: w = softmax over p of q_k P[b,p,k];  o = sum_p w P."""
    tilted = semantics[None, None] * features[:, :, None]  # [B,N,Q,D]
    weight = tilted.softmax(1)
    return (weight * features[:, :, None]).sum(1)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    """Return normal numbers that depend only on the seed."""
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)) * scale


def with_gradients(function: Any, features: Tensor, semantics: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output and the gradients of <weight, output>."""
    features, semantics = features.detach().requires_grad_(), semantics.detach().requires_grad_()
    output = function(features, semantics)
    by_features, by_semantics = torch.autograd.grad((output * weight).sum(), (features, semantics))
    return output.detach(), by_features, by_semantics
