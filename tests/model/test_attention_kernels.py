"""Which kernels of the semantic attention run: compiled once for all shapes, tiles without a compiler, Triton on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from msrn_ray.model.semantic_attention import SemanticAttention

from .attention_forms import compiled, random


def test_one_kernel_for_all_sizes() -> None:
    """Levels, short batches, evaluation and autocast find what the first call compiled."""
    compiled(random(2, 30, 256, dtype=torch.float32), random(20, 256, dtype=torch.float32))  # or skip
    attention = SemanticAttention()
    attention.choose_kernels("on", torch.device("cpu"))
    before = counters["stats"]["unique_graphs"]
    for batch, positions, vectors, width in (
        (2, 784, 5, 16),
        (1, 49, 5, 16),
        (7, 49, 49, 16),
        (1, 1, 3, 16),
        (3, 9, 2, 7),
    ):
        levels = [random(batch, positions, width, dtype=torch.float32).requires_grad_()]
        semantics = random(vectors, width, dtype=torch.float32).requires_grad_()
        output = attention(levels, semantics)
        output.backward(torch.randn_like(output))
        with torch.inference_mode():
            attention(levels, semantics)
        with torch.autocast("cpu", torch.bfloat16):
            loss = attention(levels, semantics).sum()
        loss.backward()
    assert counters["stats"]["unique_graphs"] == before


def test_the_chosen_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["msrn_ray.model.semantic_attention"]
    calls: list[str] = []
    run = module._run_compiled

    def note(kernel: Any, *inputs: Tensor) -> Any:
        calls.append(kernel.__name__)
        return run(kernel, *inputs)

    monkeypatch.setattr(module, "_run_compiled", note)
    compiled(random(2, 3, 4), random(5, 4))  # or skip
    attention = SemanticAttention()
    expected: dict[Any, list[str]] = {"off": [], "on": ["_moments", "_pull_back"]}
    for choice, names in expected.items():
        attention.choose_kernels(choice, torch.device("cpu"))
        calls.clear()
        attention([random(2, 9, 5).requires_grad_()], random(3, 5)).sum().backward()
        assert calls == names


def test_off_compiles_no_kernels() -> None:
    attention = SemanticAttention()
    assert attention.choose_kernels("off", torch.device("cpu")) == "tile by tile"
    assert not attention.compiled


def run_python(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_without_a_compiler(tmp_path: Path) -> None:
    """`auto` runs tile by tile and gives the reason; `on` raises an error with the reason."""
    script = """
import torch
from msrn_ray.errors import UserError
from msrn_ray.model.semantic_attention import SemanticAttention
attention = SemanticAttention()
print(attention.choose_kernels("auto", torch.device("cpu")))
print(attention.compiled, attention([torch.ones(1, 4, 3)], torch.ones(2, 3)).tolist())
try:
    attention.choose_kernels("on", torch.device("cpu"))
except UserError as error:
    print(error)
"""
    output = run_python(
        "-c", script, CXX=str(tmp_path / "no-compiler"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache")
    )
    auto, computed, on = output.splitlines()
    assert auto.startswith("tile by tile, several times slower (not compiled: ")
    assert "compiler" in auto
    assert computed == "False [[[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]]"
    assert on.startswith("model.compile=on: the attention kernels cannot be compiled (")
    assert "install g++" in on


def test_gpu_kernels_under_tritons_interpreter() -> None:
    """A generated kernel per pass serves both sizes and agrees with the tiles."""
    pytest.importorskip("triton", reason="torch was built without Triton")
    found = json.loads(run_python("-m", "tests.interpreted_kernels", TRITON_INTERPRET="1").splitlines()[-1])
    assert found["launches"] == [2, 2]
    assert len(found["errors"]) == 6
    assert max(found["errors"]) < 1e-5
