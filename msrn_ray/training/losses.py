"""The training loss: multi-label soft margin, or the asymmetric loss, plus the group term (arXiv 2106.11596, section 3.4).

Shapes: B images, C labels, G groups, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import LossSettings
from ..types import MSRNOutput

ClassificationLoss = Callable[[Tensor, Tensor], Tensor]
"""logits [B, C] float, target [B, C] int8 in {1, 0, -1} -> [B] float32, the loss of each image."""


_TINY = 1e-8  # a power of exactly 0 below 1 has an infinite slope, which times 0 would be nan


def build_loss(settings: LossSettings) -> ClassificationLoss:
    """The classification loss that the settings name."""
    if settings.name == "soft_margin":
        return classification_loss
    return partial(
        asymmetric_loss,
        gamma_positive=settings.gamma_positive,
        gamma_negative=settings.gamma_negative,
        clip=settings.clip,
    )


def classification_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Multi-label soft margin loss of each image: mean over its known labels of the binary cross-entropy.

    Args:
        logits: [B, C] float.
        target: [B, C] int8 in {1, 0, -1}; -1 (unknown) is left out of the mean.

    Returns:
        [B] float32 >= 0; 0 for an image without a known label.
    """
    known = target >= 0
    loss = F.binary_cross_entropy_with_logits(logits.float(), target.clamp(min=0).float(), reduction="none")
    return (loss * known).sum(1) / known.sum(1).clamp(min=1)


def asymmetric_loss(
    logits: Tensor, target: Tensor, *, gamma_positive: float, gamma_negative: float, clip: float
) -> Tensor:
    """Asymmetric loss of each image: mean over its known labels, where the source sums, so that learning rates stay comparable.

    With p = sigmoid(logit) and q = max(p - clip, 0): -(1 - p)^gamma_positive log p for a present label, -q^gamma_negative log(1 - q) for an
    absent one. All gammas and the clip at 0 give `classification_loss`.

    Args:
        logits: [B, C] float.
        target: [B, C] int8 in {1, 0, -1}; -1 (unknown) is left out of the mean.
        gamma_positive, gamma_negative: >= 0, focusing of present and absent labels.
        clip: in [0, 1), probability below which an absent label adds nothing.

    Returns:
        [B] float32 >= 0; 0 for an image without a known label.

    Source: Ridnik et al., "Asymmetric Loss For Multi-Label Classification", arXiv 2009.14119, section 2.
    """
    logits = logits.float()
    known = target >= 0
    probability = torch.sigmoid(logits)
    shifted = (probability - clip).clamp(min=0)
    log_absent = torch.log1p(-shifted) if clip else F.logsigmoid(-logits)  # the latter also where p rounds to 1
    loss = -torch.where(
        target > 0,
        (1 - probability).clamp(min=_TINY) ** gamma_positive * F.logsigmoid(logits),
        shifted.clamp(min=_TINY) ** gamma_negative * log_absent,
    )
    return (loss * known).sum(1) / known.sum(1).clamp(min=1)


def group_loss(output: MSRNOutput) -> Tensor:
    """Sum over labels of || E_i - Q_g ||_2 with g the group of the label's largest assignment; [] float32 >= 0.

    The argmax carries no gradient. 0 for a model without semantics. The norm's gradient at E_i = Q_g is 0.
    """
    if output.label_embedding is None or output.group_embedding is None or output.assignment is None:
        return output.logits.new_zeros((), dtype=torch.float32)
    nearest = output.group_embedding[output.assignment.argmax(1)]
    distance: Tensor = torch.linalg.vector_norm(output.label_embedding - nearest, dim=1)
    return distance.sum()
