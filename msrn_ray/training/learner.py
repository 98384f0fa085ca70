"""Everything that one optimizer step changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from .losses import ClassificationLoss, classification_loss


@dataclass
class Learner:
    """All that one optimizer step changes.

    Attributes:
        model: the network, or DistributedDataParallel around it.
        optimizer, scheduler: stepped once a step.
        scaler: scales the loss in float16; disabled otherwise.
        ema: moving average of the network's weights, or None.
        amp_dtype: autocast type, or None for float32.
        clip_norm: largest gradient norm, or None.
        accumulation: micro-batches a step.
        group_weight: weight of the group loss.
        loss: the classification loss that is trained on.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None
    amp_dtype: torch.dtype | None
    clip_norm: float | None
    accumulation: int
    group_weight: float
    loss: ClassificationLoss = classification_loss

    @property
    def network(self) -> nn.Module:
        """The network without its DistributedDataParallel wrapper."""
        inner = getattr(self.model, "module", self.model)
        assert isinstance(inner, nn.Module)
        return inner
