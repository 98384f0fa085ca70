"""The losses against torch's losses and against loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # the field's name for it

from msrn_ray.settings import LossSettings
from msrn_ray.training.losses import asymmetric_loss, build_loss, classification_loss, group_loss
from msrn_ray.types import MSRNOutput


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def labels(*shape: int, low: int, seed: int = 0) -> Tensor:
    return torch.randint(low, 2, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_equals_multilabel_soft_margin(scale: float) -> None:
    logits, target = random(6, 7, scale=scale), labels(6, 7, low=0)
    expected = F.multilabel_soft_margin_loss(logits, target.float(), reduction="none")
    loss = classification_loss(logits, target)
    assert loss.shape == (6,)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 1000))
def test_unknown_labels_are_left_out(num_images: int, num_labels: int, seed: int) -> None:
    logits, target = (
        random(num_images, num_labels, seed=seed, scale=3),
        labels(num_images, num_labels, low=-1, seed=seed),
    )
    logits.requires_grad_()
    loss = classification_loss(logits, target)
    loss.sum().backward()
    assert logits.grad is not None
    for image in range(num_images):
        known = target[image] >= 0
        alone = logits.detach()[image : image + 1, known].requires_grad_()
        if not known.any():
            assert loss[image] == 0
            assert (logits.grad[image] == 0).all()
            continue
        expected = F.multilabel_soft_margin_loss(alone, target[image : image + 1, known].float())
        expected.backward()
        torch.testing.assert_close(loss[image], expected)
        torch.testing.assert_close(logits.grad[image, known], alone.grad[0])
        assert (logits.grad[image, ~known] == 0).all()


def test_half_precision_logits_give_a_float32_loss() -> None:
    logits, target = random(3, 4, scale=5).bfloat16(), labels(3, 4, low=0)
    loss = classification_loss(logits, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, classification_loss(logits.float(), target), rtol=0, atol=0)


def semantics(seed: int = 0, num_labels: int = 6, num_groups: int = 3, width: int = 5) -> MSRNOutput:
    assignment = random(num_labels, num_groups, seed=seed + 2, scale=2).softmax(1)
    return MSRNOutput(
        torch.zeros(1, num_labels),
        random(num_labels, width, seed=seed).requires_grad_(),
        random(num_groups, width, seed=seed + 1).requires_grad_(),
        assignment.requires_grad_(),
    )


@pytest.mark.parametrize("seed", range(5))
def test_group_loss_by_loop(seed: int) -> None:
    output = semantics(seed)
    label, group, assignment = output.label_embedding, output.group_embedding, output.assignment
    assert label is not None
    assert group is not None
    assert assignment is not None
    expected, by_label, by_group = 0.0, torch.zeros_like(label), torch.zeros_like(group)
    chosen = set()
    for i in range(len(label)):
        best = max(range(len(group)), key=lambda g, i=i: float(assignment[i, g].detach()))
        chosen.add(best)
        difference = (label[i] - group[best]).detach()
        distance = float(difference.pow(2).sum() ** 0.5)
        expected += distance
        by_label[i] += difference / distance
        by_group[best] -= difference / distance
    loss = group_loss(output)
    loss.backward()
    assert len(chosen) > 1, "a single group would test nothing"
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(label.grad, by_label)
    torch.testing.assert_close(group.grad, by_group)
    assert assignment.grad is None, "the argmax carries no gradient"


def test_group_loss_where_label_and_group_coincide() -> None:
    output = semantics()
    group = torch.ones(3, 5, requires_grad=True)
    label = torch.ones(6, 5)
    label[0, 0] = 3
    label.requires_grad_()
    loss = group_loss(output._replace(label_embedding=label, group_embedding=group))
    loss.backward()
    assert loss.item() == pytest.approx(2)
    assert label.grad is not None
    assert label.grad.tolist() == [[1, 0, 0, 0, 0]] + [[0] * 5] * 5
    assert torch.isfinite(group.grad).all()


def test_group_loss_of_a_baseline_is_zero() -> None:
    logits = random(2, 3).bfloat16().requires_grad_()
    loss = group_loss(MSRNOutput(logits))
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.item() == 0
    (logits.float().sum() + loss).backward()


@pytest.mark.parametrize(("positive", "negative", "clip"), [(0, 4, 0.05), (1, 2, 0.2), (0.5, 0.5, 0), (2, 0, 0.1)])
def test_asymmetric_loss_by_loop(positive: float, negative: float, clip: float) -> None:
    logits, target = random(5, 6, scale=4), labels(5, 6, low=-1)
    loss = asymmetric_loss(logits, target, gamma_positive=positive, gamma_negative=negative, clip=clip)
    assert loss.shape == (5,)
    for image in range(5):
        terms = []
        for logit, label in zip(logits[image].tolist(), target[image].tolist(), strict=True):
            p = 1 / (1 + math.exp(-logit))
            q = max(p - clip, 0)
            if label >= 0:
                terms.append(-((1 - p) ** positive) * math.log(p) if label else -(q**negative) * math.log(1 - q))
        assert loss[image].item() == pytest.approx(sum(terms) / max(1, len(terms)), rel=1e-4, abs=1e-6)


def test_asymmetric_loss_without_gammas_is_soft_margin_loss() -> None:
    logits, target = random(20, 7, scale=20), labels(20, 7, low=-1)
    loss = asymmetric_loss(logits, target, gamma_positive=0, gamma_negative=0, clip=0)
    torch.testing.assert_close(loss, classification_loss(logits, target))


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 4])
@pytest.mark.parametrize("clip", [0, 0.05])
@pytest.mark.parametrize("logit", [-200.0, -20.0, 0.0, 20.0, 200.0])
def test_asymmetric_loss_has_finite_gradients_everywhere(gamma: float, clip: float, logit: float) -> None:
    logits = torch.full((1, 3), logit, requires_grad=True)
    loss = asymmetric_loss(logits, torch.tensor([[1, 0, -1]]), gamma_positive=gamma, gamma_negative=gamma, clip=clip)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 2] == 0


def test_settings_choose_the_loss() -> None:
    logits, target = random(3, 4, scale=3), labels(3, 4, low=0)
    assert build_loss(LossSettings()) is classification_loss
    asl = LossSettings(name="asl", gamma_positive=1, gamma_negative=3, clip=0.1)
    expected = asymmetric_loss(logits, target, gamma_positive=1, gamma_negative=3, clip=0.1)
    torch.testing.assert_close(build_loss(asl)(logits, target), expected, rtol=0, atol=0)
