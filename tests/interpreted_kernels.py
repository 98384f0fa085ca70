"""Generate the GPU kernels of the attention without a GPU, run them under Triton's interpreter, print errors and launches as JSON.

    TRITON_INTERPRET=1 python -m tests.interpreted_kernels

Inductor writes Triton for the CPU device. Its launcher would pick block sizes from the GPU's properties. The launcher here runs the
generated source unchanged, with small blocks, so that the masks at the ends are used.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import torch.utils._triton
import triton.language as tl
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile

X_BLOCK, Y_BLOCK, REDUCTION_BLOCK = 16, 4, 8


class Launcher:
    """Runs a generated kernel block after block."""

    def __init__(self, name: str, source: str, folder: Path) -> None:
        self.name, self.launches = name, 0
        plain = re.sub(r"@triton_heuristics\.\w+\(.*?\n\)\n@triton\.jit", "@triton.jit", source, flags=re.DOTALL)
        # the interpreter reads the source from a file
        (folder / f"{name}.py").write_text(plain.replace("triton_helpers.set_driver_to_cpu()", ""), encoding="utf-8")
        sys.path.insert(0, str(folder))
        module = importlib.import_module(name)
        module.libdevice = tl  # the device library has no interpreter
        self.kernel = getattr(module, name)

    def run(self, *arguments: Any, stream: object) -> None:
        self.launches += 1
        blocks = {"XBLOCK": X_BLOCK, "R0_BLOCK": REDUCTION_BLOCK}
        sizes = arguments[-2:-1]  # outputs along x
        if "YBLOCK" in self.kernel.arg_names:
            blocks["YBLOCK"] = Y_BLOCK
            sizes = arguments[-2], arguments[-3]  # along x and y
        grid = tuple(-(-size // block) for size, block in zip(sizes, (X_BLOCK, Y_BLOCK), strict=False))
        self.kernel[grid](*arguments, **blocks)


def main(folder: Path) -> None:
    """Print the largest relative difference of each output to the tiles, and the launches per kernel; folder: for sources."""
    from msrn_ray.model import semantic_attention

    launchers: list[Launcher] = []

    def make_launcher(self: AsyncCompile, name: str, source: str, device_str: str = "cpu") -> Launcher:
        launchers.append(Launcher(name, source, folder))
        return launchers[-1]

    AsyncCompile.triton = make_launcher
    torch.utils._triton.triton_hash_with_backend = lambda: "interpreter"
    torch._inductor.config.cpu_backend = "triton"
    torch._inductor.config.force_disable_caches = True
    errors = []
    for batch, positions, vectors, width in ((2, 30, 7, 20), (3, 5, 9, 17)):
        generator = torch.Generator().manual_seed(positions)
        features = torch.randn(batch, positions, width, generator=generator)
        semantics = 3 * torch.randn(vectors, width, generator=generator)
        weight = torch.randn(batch, vectors, width, generator=generator)
        results = []
        for compiled in (True, False):
            leaves = (features.clone().requires_grad_(), semantics.clone().requires_grad_())
            output = semantic_attention(*leaves, compiled=compiled)
            results.append([output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)])
        errors += [difference(actual, expected) for actual, expected in zip(*results, strict=True)]
    print(json.dumps({"errors": errors, "launches": [launcher.launches for launcher in launchers]}))


def difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected number."""
    return float((actual - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as sources:
        main(Path(sources))
