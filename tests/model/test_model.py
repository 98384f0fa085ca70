"""MSRN, its heads and the baselines: shapes, gradients and logits, on a tiny ResNet at 64 pixels."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from msrn_ray.model import MSRN, PooledLinear, build_model, set_prior_bias
from msrn_ray.model.msrn import ElementwiseHead, MLPHead
from msrn_ray.settings import LEVELS

from .networks import NUM_LABELS, WIDTH, random, small_network, small_settings, total_loss

CHANNELS = {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512}
SUBSETS = [subset for size in range(1, 5) for subset in itertools.combinations(LEVELS, size)]


@pytest.mark.parametrize("levels", SUBSETS, ids="-".join)
def test_any_levels_with_either_head(levels: tuple[str, ...]) -> None:
    images = random(2, 3, 64, 64)
    for head in ("mlp", "elementwise"):
        model = small_network(levels=levels, head=head)
        assert isinstance(model, MSRN)
        output = model(images)
        assert output.logits.shape == (2, NUM_LABELS)
        assert output.label_embedding.shape == (NUM_LABELS, WIDTH)
        assert output.group_embedding.shape == (2, WIDTH)
        assert output.assignment.shape == (NUM_LABELS, 2)
        torch.testing.assert_close(output.assignment.sum(1), torch.ones(NUM_LABELS))
        total_loss(output).backward()
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad, name
            assert parameter.grad is not None, f"{name} gets no gradient"
            assert torch.isfinite(parameter.grad).all(), name
        deepest = LEVELS.index(levels[-1])
        kept = {name.split(".")[0] for name, _ in model.backbone.named_parameters()}
        assert kept == {"conv1", "bn1", *LEVELS[: deepest + 1]}, "stages after the last level must be dropped"
        assert set(model.buffer_convs) == set(levels) - {"layer4"}
        for level in levels:
            assert model.projections[level].weight.shape == (WIDTH, CHANNELS[level], 1, 1)
            if level != "layer4":
                assert model.buffer_convs[level].weight.shape == (CHANNELS[level], CHANNELS[level], 1, 1)
        sides = {"layer1": 16, "layer2": 8, "layer3": 4, "layer4": 2}
        features = model.forward_features(images)
        assert [tuple(feature.shape) for feature in features] == [
            (2, (sides[level] // 2) ** 2, WIDTH) for level in levels
        ]


@torch.no_grad()
def test_forward_by_hand() -> None:
    """Buffer, 2x2 maximum, projection, attention, levels side by side, head."""
    model = small_network(levels=("layer2", "layer4")).eval()
    images = random(2, 3, 96, 64)
    output = model(images)
    fine, coarse = model.backbone(images)
    buffered = model.buffer_convs["layer2"](fine)
    semantics = torch.cat([output.label_embedding, output.group_embedding])
    parts = []
    for level, features in (("layer2", buffered), ("layer4", coarse)):
        batch, channels, height, width = features.shape
        blocks = features[:, :, : height // 2 * 2, : width // 2 * 2]
        pooled = blocks.reshape(batch, channels, height // 2, 2, width // 2, 2).amax((3, 5))
        conv = model.projections[level]
        projected = torch.einsum("bchw,dc->bhwd", pooled, conv.weight[:, :, 0, 0]) + conv.bias
        positions = projected.reshape(batch, -1, WIDTH)
        weight = (semantics[None, None] * positions[:, :, None]).softmax(1)
        parts.append((weight * positions[:, :, None]).sum(1))
    fused = torch.cat(parts, 2)
    logits = model.head(fused[:, :NUM_LABELS], fused[:, NUM_LABELS:], output.assignment)
    torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_trunk_continues_without_the_buffer() -> None:
    model = small_network(levels=("layer3", "layer4")).eval()
    images = random(1, 3, 64, 64)
    before = model.forward_features(images)
    model.buffer_convs["layer3"].weight.mul_(3)
    after = model.forward_features(images)
    assert not torch.allclose(before[0], after[0])
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize(
    ("ratio", "num_labels", "groups"), [(0.05, 5, 1), (0.2, 20, 4), (0.05, 81, 4), (0.39, 5, 1), (1, 5, 5)]
)
def test_number_of_groups(ratio: float, num_labels: int, groups: int) -> None:
    model = build_model(
        small_settings(group_ratio=ratio, levels=("layer1",)), random(num_labels, 3), torch.eye(num_labels) > 0
    )
    assert isinstance(model, MSRN)
    assert model.group_semantics.assign.weight.shape[1] == groups


@torch.no_grad()
def test_evaluation_repeats_and_images_do_not_interact() -> None:
    for name in ("msrn", "gap", "gmp"):
        model = small_network(name=name)
        model(random(2, 3, 64, 64, seed=9))  # moves the BatchNorm statistics
        model.eval()
        images = random(4, 3, 64, 64, seed=1)
        logits = model(images).logits
        assert torch.equal(logits, model(images).logits)
        alone = torch.cat([model(images[index : index + 1]).logits for index in (2, 0)])
        torch.testing.assert_close(logits[[2, 0]], alone, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(logits[0], logits[1]), "the images do not matter"


@torch.no_grad()
def test_elementwise_head_equals_a_loop() -> None:
    torch.manual_seed(0)
    num_labels, num_groups, width = 4, 3, 6
    head = ElementwiseHead(num_labels, width)
    labels, groups = random(2, num_labels, width), random(2, num_groups, width, seed=1)
    assignment = random(num_labels, num_groups, seed=2).softmax(1)
    expected = torch.zeros(2, num_labels)
    for image in range(2):
        for label in range(num_labels):
            sent_back = sum(assignment[label, group] * groups[image, group] for group in range(num_groups))
            both = torch.tanh(torch.cat([labels[image, label], sent_back]))
            expected[image, label] = torch.dot(head.weight[label], both) + head.bias[label]
    torch.testing.assert_close(head(labels, groups, assignment), expected)
    bound = 1 / math.sqrt(2 * width)
    assert head.weight.shape == (num_labels, 2 * width)
    for parameter in head.parameters():
        assert 0.5 * bound < parameter.abs().max() <= bound


@torch.no_grad()
def test_mlp_head_equals_a_loop() -> None:
    torch.manual_seed(0)
    head = MLPHead(4, 3, 6, 10)
    labels, groups = random(2, 4, 6), random(2, 3, 6, seed=1)
    for image in range(2):
        flat = torch.cat([*labels[image], *groups[image]]).tanh()
        hidden = head.hidden.weight @ flat + head.hidden.bias
        hidden = torch.where(hidden > 0, hidden, 0.01 * hidden)
        expected = head.output.weight @ hidden + head.output.bias
        torch.testing.assert_close(head(labels, groups, random(4, 3))[image], expected)


@pytest.mark.parametrize("name", ["gap", "gmp"])
@torch.no_grad()
def test_baselines_by_hand(name: str) -> None:
    model = small_network(name=name, levels=("layer1",)).eval()
    assert isinstance(model, PooledLinear)
    images = random(2, 3, 128, 96)
    (features,) = model.backbone(images)
    assert features.shape == (2, 512, 4, 3), "the baselines look at layer4 whatever the levels"
    pooled = features.sum((2, 3)) / 12 if name == "gap" else features.flatten(2).max(2).values
    output = model(images)
    torch.testing.assert_close(output.logits, pooled @ model.head.weight.t() + model.head.bias)
    assert output[1:] == (None, None, None)


@pytest.mark.parametrize("change", [{"head": "mlp"}, {"head": "elementwise"}, {"name": "gap"}, {"name": "gmp"}])
@torch.no_grad()
def test_prior_bias_sets_the_base_rates(change: dict[str, Any]) -> None:
    model = small_network(levels=("layer4",), **change)
    frequency = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.3])
    before = model.eval()(random(1, 3, 64, 64)).logits
    old = (model.head.bias if "name" in change or change["head"] == "elementwise" else model.head.output.bias).clone()
    set_prior_bias(model, frequency)
    shift = model(random(1, 3, 64, 64)).logits - before + old
    torch.testing.assert_close(shift[0].sigmoid(), frequency, rtol=1e-3, atol=1e-4)
