"""The baselines: the backbone of MSRN, one global pooling, one linear layer.

Shapes: B images, C labels; layer4 is [B, channels, H / 32, W / 32].
Source: the plain ResNet-101 rows of ML-GCN (Chen et al., CVPR 2019, tables 1 and 2) use global max pooling.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..settings import ModelSettings
from ..types import MSRNOutput
from .backbone import Backbone


class PooledLinear(nn.Module):
    """layer4 features, global average (`gap`) or max (`gmp`) pooling, linear layer; ignores `model.levels`."""

    def __init__(self, settings: ModelSettings, num_labels: int) -> None:
        super().__init__()
        self.backbone = Backbone(
            settings.backbone,
            ("layer4",),
            frozen_stages=settings.frozen_stages,
            frozen_batchnorm=settings.frozen_batchnorm,
        )
        self.pool = nn.AdaptiveAvgPool2d(1) if settings.name == "gap" else nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(self.backbone.channels["layer4"], num_labels)

    def forward(self, images: Tensor) -> MSRNOutput:
        """Return `MSRNOutput` with only logits [B, C]; images: [B, 3, H, W] float, normalised."""
        (features,) = self.backbone(images)
        return MSRNOutput(self.head(self.pool(features).flatten(1)))
