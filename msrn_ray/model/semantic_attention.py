"""Semantic-guided attention: a spatial softmax per semantic vector and channel pools each feature map.

Shapes: B images, N positions, D channels, Q semantic vectors (labels and groups), R = B * D rows, a row being one channel of one image.

    w[b,p,q,k] = softmax over p of ( q_k * P[b,p,k] )        o[b,q,k] = sum_p w[b,p,q,k] * P[b,p,k]

Source: arXiv 2106.11596, section 3.3. o is the mean of P under an exponential tilt, so its derivative by q_k is the variance of P
under the same weights; q_k = 0 is mean pooling, q_k -> inf is max pooling. The largest exponent is known without a pass: it is
at the largest P where q_k > 0 and at the smallest elsewhere. So two passes of exp are enough: one for the three moments forward, one
for the gradient of P backward. Each runs as one compiled kernel, or tile by tile, and nothing of size [B,N,Q,D] ever exists.

exp is computed as 2^(q x log2 e): GPUs have it in hardware, and Inductor's CPU code generator would write an `exp` that three sums
share to memory, [Q,R,N] of it, instead of keeping it in a register.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import UserError

# Numbers of [Q,rows,N] that eager code holds at one time. CPU: larger tiles than 1 MB of float32 leave the cache. GPU: smaller tiles than
# 256 MB take too many launches.
_CPU_TILE_ELEMENTS, _GPU_TILE_ELEMENTS = 2**18, 2**26


def _moments(features: Tensor, tilt: Tensor, extreme: Tensor, center: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums over positions of w, w x and w x^2, [Q,R] each, where x = P - center, w = 2^(tilt (P - extreme)) <= 1.

    Args:
        features: P, [R,N].
        tilt: q log2 e, [Q,R].
        extreme: [Q,R], where w is 1.
        center: [Q,R], near the tilted mean, so that the sums are small.
    """
    weight = (tilt[..., None] * (features[None] - extreme[..., None])).exp2_()
    offset = features[None] - center[..., None]
    moment = weight * offset
    return weight.sum(-1), moment.sum(-1), (moment * offset).sum(-1)


def _pull_back(features: Tensor, tilt: Tensor, extreme: Tensor, constant: Tensor, slope: Tensor) -> Tensor:
    """Return the sum over semantic vectors of w (constant + slope (P - extreme)), [R,N]; constant, slope: [Q,R]; rest as in `_moments`."""
    offset = features[None] - extreme[..., None]
    weight = (tilt[..., None] * offset).exp2_()
    return (weight * (constant[..., None] + slope[..., None] * offset)).sum(0)


def _run_tiled(kernel: Callable[..., Any], features: Tensor, *by_vector: Tensor) -> Any:
    """Run `kernel` over tiles of rows that stay in the cache; features: [R,N], by_vector: [Q,R] each."""
    elements = _CPU_TILE_ELEMENTS if features.device.type == "cpu" else _GPU_TILE_ELEMENTS
    size = max(1, elements // (features.shape[1] * len(by_vector[0])))
    tiles = [
        kernel(features[start : start + size], *(tensor[:, start : start + size] for tensor in by_vector))
        for start in range(0, len(features), size)
    ]
    if isinstance(tiles[0], Tensor):
        return torch.cat(tiles)
    return tuple(torch.cat(parts, 1) for parts in zip(*tiles, strict=True))


def _run_compiled(kernel: Callable[..., Any], *inputs: Tensor) -> Any:
    """Run the compiled `kernel`; inputs: [R,N] or [Q,R]. A side of 1 runs tiled: the compiler would write a kernel just for it."""
    if min(size for tensor in inputs for size in tensor.shape) == 1:
        return _run_tiled(kernel, *inputs)
    return _compiled(kernel)(*inputs)


@cache
def _compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Compile for all shapes at once: a kernel per shape would compile anew for each level and each short batch."""
    return torch.compile(kernel, dynamic=True, fullgraph=True, options=_inductor_options)


# A first run waits for the C++ compiler. Precompiling its headers and probing its instruction sets pay for many kernels, not for two.
# If compiling fails without them, `compile_kernels` uses both.
_inductor_options: dict[str, str | int | bool | Callable[..., Any]] = {
    "cpp_cache_precompile_headers": False,
    "cpp.vec_isa_ok": True,
}


def compile_kernels(device: torch.device, rank: int) -> None:
    """Compile both kernels or load them from Inductor's cache, through which ranks that start with different kernels share them.

    Raises:
        Exception: of any kind that Inductor raises if no compiler works.
    """
    try:
        _call_kernels(device, rank)
    except Exception:  # Inductor raises many kinds; the second attempt raises what probing does not fix
        if not _inductor_options:
            raise
        _inductor_options.clear()
        _compiled.cache_clear()
        torch.compiler.reset()
        _call_kernels(device, rank)


@torch.no_grad()
def _call_kernels(device: torch.device, rank: int) -> None:
    features = torch.zeros(512, 30, device=device)
    passes: list[tuple[Callable[..., Any], int]] = [(_moments, 3), (_pull_back, 4)]
    for kernel, num_inputs in passes if rank % 2 == 0 else reversed(passes):
        # separate inputs: for a tensor given twice the compiler would write a kernel just for that case
        _run_compiled(kernel, features, *(torch.zeros(20, 512, device=device) for _ in range(num_inputs)))
    with torch.inference_mode():  # its tensors are of another kind, for which the compiler traces again
        features, vector = torch.zeros(512, 30, device=device), torch.zeros(20, 512, device=device)
        _run_compiled(_moments, features, vector, vector.clone(), vector.clone())


def _tilt(semantics: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return tilt and extreme of each row, [Q,R]; semantics: [Q,D]; low, high: [R], smallest and largest feature."""
    tilt = (semantics * math.log2(math.e)).repeat(1, len(low) // semantics.shape[1])
    return tilt, torch.where(tilt > 0, high, low)


class _TiltedMean(torch.autograd.Function):
    """The exponentially tilted mean, with its closed-form gradient: features [B,N,D], semantics [Q,D] -> [B,Q,D].

    Keeps tensors of [B,N,D] and [B,Q,D] for backward.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, semantics: Tensor, compiled: bool) -> Tensor:
        run = _run_compiled if compiled else _run_tiled
        batch, positions, width = features.shape
        rows = features.transpose(1, 2).reshape(batch * width, positions).contiguous()
        low, high = rows.aminmax(dim=1)
        tilt, extreme = _tilt(semantics, low, high)
        # The tilted mean is near the extreme if one position has most of the weight, and near the plain mean if the N others together
        # have more. Sums of distances from a near center lose no digits when they become a mean and a variance.
        plain = rows.mean(1).expand_as(extreme)
        center = torch.where(tilt * (plain - extreme) > -math.log2(positions), plain, extreme)
        total, first, second = run(_moments, rows, tilt, extreme, center)
        mean = first / total
        ctx.save_for_backward(rows, semantics, low, high, total, center - extreme + mean, second / total - mean * mean)
        ctx.run = run
        output: Tensor = (center + mean).view(-1, batch, width).transpose(0, 1).contiguous()
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, semantics, low, high, total, mean, variance = ctx.saved_tensors
        batch, vectors, width = grad.shape
        grad = grad.transpose(0, 1).reshape(vectors, batch * width).contiguous()  # [Q,R]; a view where B is 1
        grad_features = grad_semantics = None
        if ctx.needs_input_grad[1]:
            grad_semantics = (grad * variance).view(vectors, batch, width).sum(1)
        if ctx.needs_input_grad[0]:
            tilt, extreme = _tilt(semantics, low, high)
            scaled = grad / total
            slope = scaled * tilt * math.log(2)  # sum_q g w (1 + q (P - o))
            pulled = ctx.run(_pull_back, rows, tilt, extreme, scaled - slope * mean, slope)
            grad_features = pulled.view(batch, width, -1).transpose(1, 2)
        return grad_features, grad_semantics, None


def semantic_attention(features: Tensor, semantics: Tensor, *, compiled: bool = False) -> Tensor:
    """Pool the positions of a feature map once per semantic vector and channel.

    Args:
        features: [B, N, D] float.
        semantics: [Q, D] float, label or group embeddings.
        compiled: run both passes as compiled kernels (see `SemanticAttention.choose_kernels`), not tile by tile.

    Returns:
        [B, Q, D], each value between the smallest and the largest feature of its channel; float32 for half precision.

    Raises:
        ValueError: if the widths differ or a side is 0; gives both shapes.

    Source: arXiv 2106.11596, section 3.3.
    """
    shapes = tuple(features.shape), tuple(semantics.shape)
    fits = features.dim() == 3 and semantics.dim() == 2 and features.shape[2] == semantics.shape[1]
    if not fits or 0 in shapes[0] + shapes[1]:
        raise ValueError(f"features {shapes[0]} and semantics {shapes[1]} must be [B, N, D] and [Q, D], no side 0")
    if features.dtype.itemsize < 4 or semantics.dtype.itemsize < 4:  # exp and sums lose too much in half precision
        features, semantics = features.float(), semantics.float()
    with torch.autocast(features.device.type, enabled=False):
        output: Tensor = _TiltedMean.apply(features, semantics, compiled)
        return output


class SemanticAttention(nn.Module):
    """`semantic_attention` over several levels with the same semantics; no parameters.

    Attributes:
        compiled: which kernels run; see `choose_kernels`.
    """

    compiled = False

    def forward(self, levels: Sequence[Tensor], semantics: Tensor) -> Tensor:
        """Return [B, Q, L*D], the levels side by side; levels: L maps [B, N_l, D]; semantics: [Q, D]."""
        return torch.cat([semantic_attention(level, semantics, compiled=self.compiled) for level in levels], 2)

    def choose_kernels(self, choice: Literal["auto", "on", "off"], device: torch.device, rank: int = 0) -> str:
        """Compile the kernels for `device`, or choose eager tiles; call it once per module.

        Inductor keeps compiled kernels in TORCHINDUCTOR_CACHE_DIR, so that a machine compiles once.

        Args:
            choice: `off`: eager; `on`: compiled; `auto`: compiled where a compiler works.
            device: where the features will be.
            rank: of the process; even and odd ranks start with different kernels and share them through Inductor's cache.

        Returns:
            What was chosen, for the log.

        Raises:
            UserError: if `choice` is `on` and no compiler works; gives the reason.
        """
        self.compiled = False
        if choice == "off":
            return "tile by tile"
        start = time.perf_counter()
        try:
            compile_kernels(device, rank)
        except Exception as error:  # whatever stops the compiler, the eager tiles still work
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = next((line for line in lines if "error:" in line), lines[0]).strip()
            needed = "g++ and Python's headers, python3-dev on Debian" if device.type == "cpu" else "Triton"
            if choice == "on":
                raise UserError(
                    f"model.compile=on: the attention kernels cannot be compiled ({reason}); install {needed}, or set it to off"
                ) from None
            return f"tile by tile, several times slower (not compiled: {reason}; it needs {needed})"
        self.compiled = True
        return f"compiled in {time.perf_counter() - start:.0f} s"
