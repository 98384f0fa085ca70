"""Parameter groups, and the learning rate calculated by hand at the steps that matter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msrn_ray.model import build_model
from msrn_ray.settings import ModelSettings, OptimSettings
from msrn_ray.training.optim import build_optimizer, build_scheduler, lr_factor

NUM_LABELS = 4


def network(**change: Any) -> torch.nn.Module:
    small = {
        "backbone": "resnet10",
        "pretrained": None,
        "head": "elementwise",
        "embed_dim": 8,
        "label_hidden_dim": 8,
        "graph_hidden_dim": 8,
        "group_ratio": 0.5,
    }
    return build_model(
        ModelSettings(**(small | change)), torch.randn(NUM_LABELS, 6), torch.eye(NUM_LABELS, dtype=torch.bool)
    )


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"levels": ("layer4",)},
        {"head": "mlp", "mlp_hidden_dim": 8},
        {"frozen_stages": 3},
        {"frozen_batchnorm": True},
        {"name": "gap"},
    ],
)
def test_backbone_and_head_have_different_rates(name: str, change: dict[str, Any]) -> None:
    model = network(**change)
    settings = OptimSettings(name=name, lr=0.2, backbone_lr_factor=0.25, weight_decay=0.01, momentum=0.8)
    optimizer = build_optimizer(model, settings)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in optimizer.param_groups), "a parameter is in two groups"
    seen = set()
    for path, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in rates, f"{path} is frozen"
            continue
        slow = path.split(".")[0] in {"backbone", "buffer_convs"}
        seen.add(slow)
        assert rates.pop(id(parameter)) == pytest.approx(0.05 if slow else 0.2), path
    assert not rates, "the optimizer has parameters that are not the model's"
    assert seen == {True, False}
    assert all(group["weight_decay"] == 0.01 for group in optimizer.param_groups)
    assert isinstance(optimizer, torch.optim.SGD if name == "sgd" else torch.optim.AdamW)
    if name == "sgd":
        assert all(group["momentum"] == 0.8 for group in optimizer.param_groups)


def test_frozen_backbone_leaves_one_group() -> None:
    model = network(frozen_stages=5, levels=("layer4",))
    (group,) = build_optimizer(model, OptimSettings(lr=0.3)).param_groups
    assert group["lr"] == 0.3


def test_one_sgd_step_by_hand() -> None:
    model = torch.nn.ModuleDict(
        {"backbone": torch.nn.Linear(1, 1, bias=False), "head": torch.nn.Linear(1, 1, bias=False)}
    )
    for part in model.values():
        part.weight.data.fill_(2.0)
        part.weight.grad = torch.full((1, 1), 3.0)
    optimizer = build_optimizer(model, OptimSettings(lr=0.1, backbone_lr_factor=0.5, weight_decay=0.25, momentum=0.0))
    optimizer.step()
    assert model["backbone"].weight.item() == pytest.approx(2 - 0.05 * (3 + 0.25 * 2))
    assert model["head"].weight.item() == pytest.approx(2 - 0.1 * (3 + 0.25 * 2))


def factors(epochs: int = 4, steps: int = 10, **change: Any) -> list[float]:
    settings = OptimSettings(**change)
    return [lr_factor(settings, step, steps, epochs) for step in range(epochs * steps)]


def test_constant_schedule() -> None:
    assert factors(schedule="constant") == [1.0] * 40


def test_step_schedule() -> None:
    rates = factors(schedule="step", step_epochs=(1, 3), step_factor=0.5)
    assert rates == [1.0] * 10 + [0.5] * 20 + [0.25] * 10


def test_cosine_schedule() -> None:
    rates = factors(schedule="cosine")
    assert rates[0] == 1
    assert rates[20] == pytest.approx(0.5)
    assert rates[10] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert rates[39] == pytest.approx((1 - math.cos(math.pi / 40)) / 2)
    assert rates == sorted(rates, reverse=True)


def test_onecycle_schedule() -> None:
    rates = factors(schedule="onecycle")
    assert rates[0] == pytest.approx(1 / 25)
    assert rates[6] == pytest.approx(1 / 25 + 24 / 25 / 2)
    assert rates[12] == pytest.approx(1)
    assert rates[26] == pytest.approx(0.5)
    assert rates[39] == pytest.approx((1 - math.cos(math.pi / 28)) / 2)
    assert rates[:13] == sorted(rates[:13])
    assert rates[12:] == sorted(rates[12:], reverse=True)


@pytest.mark.parametrize(("schedule", "after"), [("constant", 1.0), ("step", 1.0), ("cosine", 1.0)])
def test_warmup(schedule: str, after: float) -> None:
    rates = factors(schedule=schedule, warmup_epochs=0.4, step_epochs=(1,))
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == after
    if schedule == "step":
        assert rates[9:11] == pytest.approx([1, 0.1]), "steps count from the start of the run"
    if schedule == "cosine":
        assert rates[22] == pytest.approx(0.5), "half way between the end of the warm-up and the end"


@settings(deadline=None)
@given(
    schedule=st.sampled_from(["step", "cosine", "onecycle", "constant"]),
    epochs=st.integers(1, 6),
    steps=st.integers(1, 12),
    warmup=st.floats(0, 8),
)
def test_factor_stays_between_zero_and_one(schedule: str, epochs: int, steps: int, warmup: float) -> None:
    change: dict[str, Any] = {"schedule": schedule, "warmup_epochs": 0 if schedule == "onecycle" else warmup}
    rates = factors(epochs, steps, **change)
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates[0] > 0
    late = lr_factor(OptimSettings(**change), epochs * steps, steps, epochs)  # a step after the last
    assert 0 <= late <= 1
    if schedule in {"cosine", "onecycle"} and (epochs - change["warmup_epochs"]) * steps >= 2:
        assert late == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
def test_factor_ends_near_zero(schedule: str) -> None:
    assert factors(10, 50, schedule=schedule)[-1] < 1e-4


@pytest.mark.parametrize("schedule", ["step", "cosine", "onecycle"])
def test_resumed_scheduler_continues_the_rates(schedule: str) -> None:
    settings = OptimSettings(lr=0.4, backbone_lr_factor=0.5, schedule=schedule, step_epochs=(1, 2))

    def build() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        model = torch.nn.ModuleDict({"backbone": torch.nn.Linear(1, 1), "head": torch.nn.Linear(1, 1)})
        optimizer = build_optimizer(model, settings)
        return optimizer, build_scheduler(optimizer, settings, 5, 3)

    def run(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[tuple[float, ...]]:
        rates = []
        for _ in range(steps):
            rates.append(tuple(group["lr"] for group in optimizer.param_groups))
            optimizer.step()
            scheduler.step()
        return rates

    whole = run(*build(), 15)
    expected = [lr_factor(settings, step, 5, 3) for step in range(15)]
    assert whole == [pytest.approx((0.2 * factor, 0.4 * factor)) for factor in expected]
    first = build()
    begun = run(*first, 7)
    second = build()
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    assert begun + run(*second, 8) == whole
