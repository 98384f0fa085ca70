"""Builds the optimizer with the reference's two parameter groups, and the learning-rate schedule as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any, assert_never

import torch
from torch import nn

from ..settings import OptimSettings

_BACKBONE = ("backbone.", "buffer_convs.")  # the release trains the buffer convolutions at the backbone's rate
_ONECYCLE_RISE, _ONECYCLE_START = 0.3, 1 / 25  # share of the run that rises, first rate / peak (Smith & Topin, 2018)


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """Build SGD or AdamW over two groups: backbone with buffer convolutions at `lr * backbone_lr_factor`, the rest at `lr`.

    Frozen parameters (requires_grad False) are left out.
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = []
    for is_backbone, factor in ((True, settings.backbone_lr_factor), (False, 1.0)):
        parameters = [parameter for name, parameter in trainable if name.startswith(_BACKBONE) == is_backbone]
        if parameters:
            groups.append({"params": parameters, "lr": settings.lr * factor})
    match settings.name:
        case "adamw":
            return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)
        case "sgd":
            return torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True)
        case _:
            assert_never(settings.name)


def lr_factor(settings: OptimSettings, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Return the factor in [0, 1] on the groups' learning rates at optimizer step `step` (0-based)."""
    total = steps_per_epoch * epochs
    warmup = settings.warmup_epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    match settings.schedule:
        case "constant":
            return 1.0
        case "step":
            return settings.step_factor ** sum(step >= epoch * steps_per_epoch for epoch in settings.step_epochs)
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, total - warmup))))
        case "onecycle":
            rise = _ONECYCLE_RISE * total
            if step < rise:
                return _ONECYCLE_START + (1 - _ONECYCLE_START) * 0.5 * (1 - math.cos(math.pi * step / rise))
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1.0, total - rise))))
        case _:
            assert_never(settings.schedule)


def build_scheduler(
    optimizer: torch.optim.Optimizer, settings: OptimSettings, steps_per_epoch: int, epochs: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Build a scheduler that applies `lr_factor` at every optimizer step."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(settings, step, steps_per_epoch, epochs))
