"""Semantic-guided attention: every semantic vector pools every channel of a feature map with its own spatial softmax.

Shapes: B images, N positions, D channels, Q semantic vectors (labels and groups).

    w[b,p,q,k] = softmax over p of ( q_k * P[b,p,k] )        o[b,q,k] = sum_p w[b,p,q,k] * P[b,p,k]

Source: arXiv 2106.11596, section 3.3. o is the mean of P under an exponential tilt, so its derivative by q_k is the variance of P
under the same weights; q_k = 0 is mean pooling, q_k -> inf is max pooling. The weights are recomputed tile by tile, so nothing
of size [B,N,Q,D] ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# weights [tile,B,Q,N] that exist at one time: 2 MB of float32 on a CPU, larger ones leave the cache; 256 MB on a GPU, smaller ones are
# too many launches
_CPU_TILE_ELEMENTS, _GPU_TILE_ELEMENTS = 2**19, 2**26


class _TiltedMean(torch.autograd.Function):
    """The exponentially tilted mean with its closed-form gradient; keeps its inputs and its output for backward."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, semantics: Tensor) -> Tensor:
        by_channel = features.permute(
            2, 0, 1
        ).contiguous()  # [D,B,N]: positions last, so that softmax runs along memory
        tilt = semantics.t().contiguous()  # [D,Q]
        output = features.new_empty(features.shape[2], features.shape[0], semantics.shape[0])  # [D,B,Q]
        for tile in _tiles(by_channel, tilt):
            weight = _weights(by_channel[tile], tilt[tile])
            torch.matmul(weight, by_channel[tile].unsqueeze(-1), out=output[tile].unsqueeze(-1))
        ctx.save_for_backward(by_channel, tilt, output)
        return output.permute(1, 2, 0).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        by_channel, tilt, output = ctx.saved_tensors
        grad = grad.permute(2, 0, 1)  # [D,B,Q]
        grad_features = torch.empty_like(by_channel)
        grad_semantics = torch.empty_like(tilt)
        for tile in _tiles(by_channel, tilt):
            weight = _weights(by_channel[tile], tilt[tile])
            deviation = by_channel[tile].unsqueeze(2) - output[tile].unsqueeze(-1)  # [d,B,Q,N]
            weight *= grad[tile].unsqueeze(-1)
            moment = weight * deviation
            grad_semantics[tile] = (moment * deviation).sum((1, 3))  # g * variance
            weight += moment * tilt[tile][:, None, :, None]
            grad_features[tile] = weight.sum(2)  # g * w * (1 + q (P - o))
        return grad_features.permute(1, 2, 0), grad_semantics.t()


def _tiles(features: Tensor, tilt: Tensor) -> Iterator[slice]:
    """Slices of channels; features: [D,B,N], tilt: [D,Q]."""
    elements = _CPU_TILE_ELEMENTS if features.device.type == "cpu" else _GPU_TILE_ELEMENTS
    size = max(1, elements // (features[0].numel() * tilt.shape[1]))
    for start in range(0, len(features), size):
        yield slice(start, start + size)


def _weights(features: Tensor, tilt: Tensor) -> Tensor:
    """features: [d,B,N], tilt: [d,Q] -> softmax over positions, [d,B,Q,N]."""
    return (tilt[:, None, :, None] * features.unsqueeze(2)).softmax(-1)


def semantic_attention(features: Tensor, semantics: Tensor) -> Tensor:
    """Pools the positions of a feature map once for each semantic vector, channel by channel.

    Args:
        features: [B, N, D] float, N >= 1.
        semantics: [Q, D] float, label or group embeddings.

    Returns:
        [B, Q, D], each value between the smallest and the largest feature of its channel; float32 under autocast.

    Raises:
        ValueError: if the widths differ or N is 0, with both shapes.

    Source: arXiv 2106.11596, section 3.3.
    """
    if features.dim() != 3 or semantics.dim() != 2 or features.shape[2] != semantics.shape[1] or features.shape[1] == 0:
        raise ValueError(
            f"features {tuple(features.shape)} and semantics {tuple(semantics.shape)} must be [B, N >= 1, D] and [Q, D]"
        )
    if torch.is_autocast_enabled(features.device.type):  # exp and sums lose too much in half precision
        features, semantics = features.float(), semantics.float()
    output: Tensor = _TiltedMean.apply(features, semantics)
    return output
