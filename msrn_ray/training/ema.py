"""Exponential moving average of the weights, on torch's own AveragedModel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

_Tensors = tuple[Tensor, ...] | list[Tensor]


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """A shadow of `model` whose weights follow it as ema = d ema + (1 - d) weight after each `update_parameters(model)`.

    d starts low and rises to `decay` as min(decay, (1 + n) / (10 + n)) after n updates, so that a short run is not held at its random
    start. Buffers (BatchNorm statistics) are copied, not averaged.

    Source: the warm-up is that of TensorFlow's ExponentialMovingAverage(num_updates).
    """

    def update(shadow: _Tensors, weights: _Tensors, _num_averaged: Tensor | int) -> None:
        count = float(ema.n_averaged)  # the module's own stays on the CPU; what is handed in was copied to the device
        torch._foreach_lerp_(shadow, weights, 1 - min(decay, (1 + count) / (10 + count)))

    ema = AveragedModel(model, multi_avg_fn=update)
    return ema


@torch.no_grad()
def copy_buffers(ema: AveragedModel, model: nn.Module) -> None:
    """Brings the shadow's buffers up to the model's."""
    for shadow, buffer in zip(ema.module.buffers(), model.buffers(), strict=True):
        shadow.copy_(buffer)
