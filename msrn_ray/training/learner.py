"""What one optimizer step changes, and how a config builds it: network, precision, optimizer, schedule, moving average; no Ray."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..config import ExperimentConfig
from ..labels.word_vectors import LEARNED
from ..model import MSRN, PooledLinear, build_model, choose_attention_kernels, set_prior_bias
from . import distributed
from .losses import ClassificationLoss, build_loss, classification_loss
from .optim import build_optimizer, build_scheduler

_Tensors = tuple[Tensor, ...] | list[Tensor]


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
        network: nn.Module = getattr(self.model, "module", self.model)
        return network

    @property
    def evaluated(self) -> nn.Module:
        """The network that is scored and saved: the moving average if there is one."""
        return self.ema.module if self.ema is not None else self.network

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device


def build_network(
    config: ExperimentConfig,
    word_vectors: Tensor,
    attend_mask: Tensor,
    frequency: Tensor,
    *,
    device: torch.device,
) -> tuple[MSRN | PooledLinear, str]:
    """Build the network of a config, still on the CPU, and choose its attention kernels.

    Args:
        config: the experiment.
        word_vectors: [C, V] float32.
        attend_mask: [C, C] bool.
        frequency: [C] float32 in (0, 1), for `model.prior_bias`.
        device: where it will be trained.

    Returns:
        The network, and a description of the chosen kernels, for the log.

    Raises:
        UserError: for weights or kernels that are not available.
    """
    network = build_model(config.model, word_vectors, attend_mask, train_vectors=config.data.word_vectors == LEARNED)
    # channels_last makes convolutions about a sixth faster on the CPU, and in half precision on a GPU
    network.to(memory_format=torch.channels_last)
    if config.model.prior_bias:
        set_prior_bias(network, frequency)
    return network, choose_attention_kernels(network, config.model, device, distributed.rank())


def build_learner(config: ExperimentConfig, model: nn.Module, device: torch.device, steps_per_epoch: int) -> Learner:
    """Build the learner for a network on `device`, or for DistributedDataParallel around it."""
    if config.optim.compress_gradients:
        distributed.compress_gradients(model)
    network: nn.Module = getattr(model, "module", model)
    amp = amp_dtype(config.train.amp, device)
    optimizer = build_optimizer(network, config.optim)
    return Learner(
        model=model,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, config.optim, steps_per_epoch, config.train.epochs),
        scaler=torch.amp.GradScaler(device.type, enabled=amp == torch.float16),
        ema=build_ema(network, config.optim.ema_decay) if config.optim.ema_decay else None,
        amp_dtype=amp,
        clip_norm=config.optim.clip_norm,
        accumulation=config.optim.accumulation,
        group_weight=config.loss.group_weight,
        loss=build_loss(config.loss),
    )


def amp_dtype(choice: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast type of a setting: `auto` is bf16 if the device computes in bf16; None means float32."""
    if choice == "auto":
        return torch.bfloat16 if has_bf16(device) else None
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[choice]


def has_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies in bf16; a CPU without these instructions would only convert back and forth."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # older torch does not report capabilities
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


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
