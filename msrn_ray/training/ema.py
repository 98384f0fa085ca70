"""Exponential moving average of the weights, on torch's AveragedModel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

_Tensors = tuple[Tensor, ...] | list[Tensor]


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """Return a copy of `model` whose weights become ema = d ema + (1 - d) weight at each `update_parameters(model)`.

    After n updates d is min(decay, (1 + n) / (10 + n)): it starts low, so that a short run does not stay near its random start.
    Buffers (BatchNorm statistics) are copied, not averaged.

    Source: the warm-up of TensorFlow's ExponentialMovingAverage(num_updates).
    """

    def update(averages: _Tensors, weights: _Tensors, _num_averaged: Tensor | int) -> None:
        count = float(ema.n_averaged)  # n_averaged stays on the CPU, while the argument was copied to the device
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + count) / (10 + count)))

    ema = AveragedModel(model, multi_avg_fn=update)
    return ema


@torch.no_grad()
def copy_buffers(ema: AveragedModel, model: nn.Module) -> None:
    """Copy the model's buffers into its moving average."""
    for average, buffer in zip(ema.module.buffers(), model.buffers(), strict=True):
        average.copy_(buffer)
