"""Builds what a config trains: network, precision, optimizer, schedule, moving average; no Ray."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import ExperimentConfig
from ..labels.word_vectors import LEARNED
from ..model import MSRN, PooledLinear, build_model, choose_attention_kernels, set_prior_bias
from . import distributed
from .ema import build_ema
from .learner import Learner
from .losses import build_loss
from .optim import build_optimizer, build_scheduler


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
    learned = config.data.word_vectors == LEARNED
    network = build_model(config.model, word_vectors, attend_mask, train_vectors=learned)
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
