"""The training loss: multi-label soft margin plus the group term (arXiv 2106.11596, section 3.4).

Shapes: B images, C labels, G groups, D embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # the field's name for it

from .types import MSRNOutput


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


def group_loss(output: MSRNOutput) -> Tensor:
    """Sum over labels of || E_i - Q_g ||_2 with g the group of the label's largest assignment; [] float32 >= 0.

    The argmax carries no gradient. 0 for a model without semantics. The norm's gradient at E_i = Q_g is 0.
    """
    if output.label_embedding is None or output.group_embedding is None or output.assignment is None:
        return output.logits.new_zeros((), dtype=torch.float32)
    nearest = output.group_embedding[output.assignment.argmax(1)]
    distance: Tensor = torch.linalg.vector_norm(output.label_embedding - nearest, dim=1)
    return distance.sum()
