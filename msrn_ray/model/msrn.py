"""The Multi-layered Semantic Representation Network.

Shapes: B images, C labels, G groups, L levels, D embedding width, N positions of a level (after 2x2 pooling).
Source: arXiv 2106.11596, section 3; the buffer convolutions and the heads follow the authors' release.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # the field's name for it

from ..settings import ModelSettings
from ..types import MSRNOutput
from .backbone import Backbone
from .label_semantics import GroupSemantics, LabelSemantics
from .semantic_attention import SemanticAttention


class MLPHead(nn.Module):
    """tanh of all label and group vectors, flattened, through two linear layers: the release's default."""

    def __init__(self, num_labels: int, num_groups: int, width: int, hidden_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear((num_labels + num_groups) * width, hidden_dim)
        self.output = nn.Linear(hidden_dim, num_labels)

    def forward(self, labels: Tensor, groups: Tensor, assignment: Tensor) -> Tensor:
        """Return logits [B, C]; labels: [B, C, L*D], groups: [B, G, L*D], assignment (not used): [C, G]."""
        flat = torch.cat([labels, groups], 1).tanh().flatten(1)
        logits: Tensor = self.output(F.leaky_relu(self.hidden(flat), 0.01))
        return logits


class ElementwiseHead(nn.Module):
    """A weight vector per label, on the label's vector and on the group vectors that the assignment sends back to it."""

    def __init__(self, num_labels: int, width: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(2 * width)
        self.weight = nn.Parameter(torch.empty(num_labels, 2 * width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_labels).uniform_(-bound, bound))

    def forward(self, labels: Tensor, groups: Tensor, assignment: Tensor) -> Tensor:
        """Return logits [B, C]; labels: [B, C, L*D], groups: [B, G, L*D], assignment: [C, G]."""
        both = torch.cat([labels, assignment.to(groups.dtype) @ groups], 2).tanh()
        return (both * self.weight).sum(2) + self.bias


class MSRN(nn.Module):
    """Label and group semantics attend to backbone levels, which are fused and scored by one head (paper section 3).

    Args:
        settings: the architecture.
        word_vectors: [C, V] float32.
        attend_mask: [C, C] bool; label row attends to label column.
        train_vectors: whether the word vectors are trained.
    """

    def __init__(
        self, settings: ModelSettings, word_vectors: Tensor, attend_mask: Tensor, *, train_vectors: bool = False
    ) -> None:
        super().__init__()
        num_labels = len(word_vectors)
        num_groups = max(1, int(settings.group_ratio * num_labels))
        width = len(settings.levels) * settings.embed_dim
        self.backbone = Backbone(
            settings.backbone,
            settings.levels,
            frozen_stages=settings.frozen_stages,
            frozen_batchnorm=settings.frozen_batchnorm,
        )
        channels = self.backbone.channels
        self.buffer_convs = nn.ModuleDict(
            {level: nn.Conv2d(channels[level], channels[level], 1) for level in settings.levels if level != "layer4"}
        )
        self.projections = nn.ModuleDict(
            {level: nn.Conv2d(channels[level], settings.embed_dim, 1) for level in settings.levels}
        )
        self.label_semantics = LabelSemantics(settings, word_vectors, attend_mask, train_vectors=train_vectors)
        self.group_semantics = GroupSemantics(settings.embed_dim, num_groups)
        self.attention = SemanticAttention()
        self.head: MLPHead | ElementwiseHead = (
            MLPHead(num_labels, num_groups, width, settings.mlp_hidden_dim)
            if settings.head == "mlp"
            else ElementwiseHead(num_labels, width)
        )

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Return the projected features P per level, [B, N, D]; images: [B, 3, H, W] float, normalised."""
        projected = []
        for level, features in zip(self.backbone.levels, self.backbone(images), strict=True):
            if level in self.buffer_convs:  # not in layer4; the trunk continues without it, as in the release
                features = self.buffer_convs[level](features)
            features = self.projections[level](F.max_pool2d(features, 2))
            projected.append(features.flatten(2).transpose(1, 2))
        return projected

    def forward(self, images: Tensor) -> MSRNOutput:
        """Return `MSRNOutput`; images: [B, 3, H, W] float, normalised by the ImageNet mean and std, H and W >= 64."""
        with torch.autocast(images.device.type, enabled=False):  # only C rows: half precision would gain nothing
            label_embedding = self.label_semantics()
            group_embedding, assignment = self.group_semantics(label_embedding, self.label_semantics.attend_mask)
        semantics = torch.cat([label_embedding, group_embedding])  # shared by all levels (paper section 3.3)
        attended = self.attention(self.forward_features(images), semantics)
        labels, groups = attended.split([len(label_embedding), len(group_embedding)], 1)
        return MSRNOutput(self.head(labels, groups, assignment), label_embedding, group_embedding, assignment)
