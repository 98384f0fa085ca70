"""The moving average against its closed form."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from msrn_ray.training.learner import build_ema, copy_buffers


class Toy(nn.Module):
    """Two weights, a BatchNorm and a bool buffer."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("mask", torch.tensor([True, False]))


def walk(model: nn.Module, seed: int) -> None:
    """Change every weight and statistic at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer += torch.rand(buffer.shape, generator=generator)


@pytest.mark.parametrize("decay", [0.15, 0.3, 0.9999])
def test_closed_form(decay: float) -> None:
    """The first update copies; after n updates ema = d ema + (1 - d) w with d = min(decay, (1 + n) / (10 + n))."""
    model = Toy()
    ema = build_ema(model, decay)
    expected: dict[str, Tensor] = {}
    for update in range(8):
        walk(model, update)
        ema.update_parameters(model)
        keep = 0.0 if update == 0 else min(decay, (1 + update) / (10 + update))
        for name, weight in model.named_parameters():
            before = expected.get(name, torch.zeros_like(weight)).double()
            expected[name] = keep * before + (1 - keep) * weight.detach().double()
        for name, average in ema.module.named_parameters():
            torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ema.module.linear.weight, model.linear.weight), "nothing was averaged"


def test_starts_as_an_independent_copy_of_the_model() -> None:
    model = Toy()
    ema = build_ema(model, 0.9)
    start = copy.deepcopy(model.state_dict())
    walk(model, 0)
    assert all(torch.equal(value, start[name]) for name, value in ema.module.state_dict().items())
    before = copy.deepcopy(model.state_dict())
    ema.update_parameters(model)
    walk(model, 1)
    ema.update_parameters(model)
    assert all(not value.requires_grad or value.grad is None for value in ema.parameters())
    walk(ema.module, 2)
    assert all(torch.equal(before[name], value) for name, value in before.items())
    assert not torch.equal(before["linear.weight"], model.linear.weight)


def test_buffers_are_copied_not_averaged() -> None:
    model = Toy()
    ema = build_ema(model, 0.9)
    for update in range(3):
        walk(model, update)
        ema.update_parameters(model)
    walk(model, 9)
    model.norm.num_batches_tracked += 5
    model.mask.logical_not_()
    weight = ema.module.linear.weight.clone()
    copy_buffers(ema, model)
    for (name, copied), buffer in zip(ema.module.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(copied, buffer), name
        assert copied.dtype == buffer.dtype
    assert ema.module.mask.tolist() == [False, True]
    assert ema.module.mask.dtype == torch.bool
    assert torch.equal(ema.module.linear.weight, weight), "only buffers are copied"
    walk(model, 10)
    assert not torch.equal(ema.module.norm.running_mean, model.norm.running_mean), "average and model share a buffer"


def test_frozen_weights_do_not_change() -> None:
    model = Toy()
    ema = build_ema(model, 0.9)
    for update in range(4):
        walk(model, update)
        ema.update_parameters(model)
    torch.testing.assert_close(ema.module.frozen, torch.ones(2))


def test_resumes_from_a_saved_state() -> None:
    model = Toy()
    ema = build_ema(model, 0.5)
    for update in range(3):
        walk(model, update)
        ema.update_parameters(model)
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    resumed = build_ema(Toy(), 0.5)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for update in range(3, 6):
        walk(model, update)
        ema.update_parameters(model)
        resumed.update_parameters(model)
    for (name, expected), value in zip(ema.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name
