"""Everything that one optimizer step changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from .losses import ClassificationLoss, classification_loss


@dataclass
class Learner:
    """A network with what trains it.

    Attributes:
        model: the network, or DistributedDataParallel around it.
        optimizer, scheduler: stepped once per training step.
        scaler: scales the loss in float16; disabled otherwise.
        ema: moving average of the network's weights, or None.
        amp_dtype: autocast type, or None for float32.
        clip_norm: largest gradient norm, or None.
        accumulation: micro-batches per step.
        group_weight: weight of the group loss.
        loss: the classification loss to train on.
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

    @property
    def evaluated(self) -> nn.Module:
        """The network that is scored and saved: the moving average if there is one."""
        return self.ema.module if self.ema is not None else self.network

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device
