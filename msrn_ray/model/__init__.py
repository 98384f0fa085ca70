"""The networks: MSRN, its parts, and the plain baselines.

Shapes: C labels, V word-vector width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..settings import ModelSettings
from .backbone import Backbone, load_pretrained
from .baselines import PooledLinear
from .msrn import MSRN, MLPHead
from .semantic_attention import semantic_attention

__all__ = [
    "MSRN",
    "Backbone",
    "PooledLinear",
    "build_model",
    "choose_attention_kernels",
    "semantic_attention",
    "set_prior_bias",
]


def build_model(
    settings: ModelSettings,
    word_vectors: Tensor,
    attend_mask: Tensor,
    *,
    pretrained: bool = True,
    train_vectors: bool = False,
) -> MSRN | PooledLinear:
    """Return the network that the settings describe.

    Args:
        settings: the architecture.
        word_vectors: [C, V] float32.
        attend_mask: [C, C] bool; label row attends to label column.
        pretrained: whether to fill the backbone from `settings.pretrained`; False if a checkpoint is loaded next.
        train_vectors: whether the word vectors are trained (`data.word_vectors` "learned").

    Raises:
        UserError: for an unknown backbone, or pretrained weights that are missing or do not fit.
    """
    model: MSRN | PooledLinear
    if settings.name == "msrn":
        model = MSRN(settings, word_vectors, attend_mask, train_vectors=train_vectors)
    else:
        model = PooledLinear(settings, len(word_vectors))
    if pretrained and settings.pretrained is not None:
        load_pretrained(model.backbone, settings.backbone, settings.pretrained)
    return model


def choose_attention_kernels(
    model: MSRN | PooledLinear, settings: ModelSettings, device: torch.device, rank: int
) -> str:
    """Compile the attention's kernels for `device` as `settings.compile` says; `rank` is that of the process in the run.

    Returns:
        What was chosen, for the log; empty if the model has no attention.

    Raises:
        UserError: if `settings.compile` is `on` and nothing can be compiled; gives the reason.
    """
    if isinstance(model, PooledLinear):
        return ""
    return f"attention kernels {model.attention.choose_kernels(settings.compile, device, rank)}"


@torch.no_grad()
def set_prior_bias(model: MSRN | PooledLinear, frequency: Tensor) -> None:
    """Set the logits' biases to the log-odds of the labels, so that training need not first learn the base rates.

    Args:
        frequency: [C] float in (0, 1), fraction of the train images with a known label in which it is present.

    Source: Lin et al., "Focal Loss for Dense Object Detection" (2017), section 4.1, with the measured rates in place of one prior.
    """
    bias = model.head.output.bias if isinstance(model.head, MLPHead) else model.head.bias
    bias.copy_(frequency.logit())
