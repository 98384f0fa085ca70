"""A tiny network at 64 pixels, and what the tests of the networks feed it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msrn_ray.model import build_model
from msrn_ray.settings import ModelSettings
from msrn_ray.training.losses import classification_loss, group_loss
from msrn_ray.types import MSRNOutput

NUM_LABELS, VECTOR, WIDTH = 5, 6, 8
MASK = torch.eye(NUM_LABELS, dtype=torch.bool)
MASK[0, 1] = MASK[2, 0] = MASK[1, 3] = MASK[3, 1] = True  # label 4 stands alone


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal numbers that depend only on the seed."""
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def small_settings(**change: Any) -> ModelSettings:
    """Return a tiny architecture whose widths all differ."""
    settings = {
        "backbone": "resnet10",
        "pretrained": None,
        "head": "elementwise",
        "embed_dim": WIDTH,
        "label_hidden_dim": 7,
        "graph_hidden_dim": 9,
        "mlp_hidden_dim": 11,
        "group_ratio": 0.4,
    }
    return ModelSettings(**(settings | change))


def small_network(**change: Any) -> Any:
    """Return the tiny network, the same weights at every call."""
    torch.manual_seed(0)
    return build_model(small_settings(**change), random(NUM_LABELS, VECTOR), MASK)


def total_loss(output: MSRNOutput, seed: int = 0) -> Tensor:
    """Return a loss through which every parameter gets a gradient; random targets [B, C]."""
    target = torch.randint(0, 2, output.logits.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    return classification_loss(output.logits, target).mean() + group_loss(output)
