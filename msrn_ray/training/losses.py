"""The training loss: multi-label soft margin, or the asymmetric loss, plus the group term (arXiv 2106.11596, section 3.4).

Shapes: B images, C labels, G groups, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import assert_never

import torch
from torch import Tensor
from torch.nn import functional as F

from ..settings import LossSettings
from ..types import MSRNOutput

ClassificationLoss = Callable[[Tensor, Tensor], Tensor]
"""logits [B, C] float, target [B, C] int8 in {1, 0, -1} -> [B] float32, the loss of each image."""

_TINY = 1e-8  # the slope of 0 ** gamma is infinite for gamma < 1, and infinity times 0 is nan


def build_loss(settings: LossSettings) -> ClassificationLoss:
    """Return the classification loss that the settings name."""
    match settings.name:
        case "soft_margin":
            return classification_loss
        case "asl":
            return partial(
                asymmetric_loss,
                gamma_positive=settings.gamma_positive,
                gamma_negative=settings.gamma_negative,
                clip=settings.clip,
            )
        case _:
            assert_never(settings.name)


def classification_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the multi-label soft margin loss of each image: the mean binary cross-entropy over its known labels.

    Args:
        logits: [B, C] float.
        target: [B, C] int8 in {1, 0, -1}; the mean leaves out -1 (unknown).

    Returns:
        [B] float32 >= 0; 0 for an image without a known label.
    """
    known = target >= 0
    loss = F.binary_cross_entropy_with_logits(logits.float(), target.clamp(min=0).float(), reduction="none")
    return (loss * known).sum(1) / known.sum(1).clamp(min=1)


def asymmetric_loss(
    logits: Tensor, target: Tensor, *, gamma_positive: float, gamma_negative: float, clip: float
) -> Tensor:
    """Return the asymmetric loss of each image: the mean over its known labels.

    The source sums over the labels. The mean keeps learning rates comparable with those of the soft margin loss.

    With p = sigmoid(logit) and q = max(p - clip, 0), the loss is -(1 - p)^gamma_positive log p for a present label
    and -q^gamma_negative log(1 - q) for an absent label. With all gammas and the clip at 0 it is `classification_loss`.

    Args:
        logits: [B, C] float.
        target: [B, C] int8 in {1, 0, -1}; the mean leaves out -1 (unknown).
        gamma_positive, gamma_negative: >= 0, focusing of present and of absent labels.
        clip: in [0, 1), probability below which an absent label adds no loss.

    Returns:
        [B] float32 >= 0; 0 for an image without a known label.

    Source: Ridnik et al., "Asymmetric Loss For Multi-Label Classification", arXiv 2009.14119, section 2.
    """
    logits = logits.float()
    known = target >= 0
    probability = torch.sigmoid(logits)
    shifted = (probability - clip).clamp(min=0)
    # logsigmoid is finite even where p rounds to 1
    log_absent = torch.log1p(-shifted) if clip else F.logsigmoid(-logits)
    loss = -torch.where(
        target > 0,
        (1 - probability).clamp(min=_TINY) ** gamma_positive * F.logsigmoid(logits),
        shifted.clamp(min=_TINY) ** gamma_negative * log_absent,
    )
    return (loss * known).sum(1) / known.sum(1).clamp(min=1)


def group_loss(output: MSRNOutput) -> Tensor:
    """Return the sum over labels of || E_i - Q_g ||_2, with g the group of the label's largest assignment; [] float32 >= 0.

    The argmax carries no gradient. The loss is 0 for a model without label semantics. The norm's gradient at E_i = Q_g is 0.
    """
    if output.label_embedding is None or output.group_embedding is None or output.assignment is None:
        return output.logits.new_zeros((), dtype=torch.float32)
    nearest = output.group_embedding[output.assignment.argmax(1)]
    distance: Tensor = torch.linalg.vector_norm(output.label_embedding - nearest, dim=1)
    return distance.sum()
