"""The networks: shapes, gradients, freezing, heads and weights, on a tiny ResNet at 64 pixels."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msrn_ray.config import LEVELS, ModelSettings
from msrn_ray.errors import UserError
from msrn_ray.model import MSRN, PooledLinear, build_model, set_prior_bias
from msrn_ray.model.backbone import STAGES, Backbone, build_resnet, load_pretrained
from msrn_ray.model.label_semantics import GraphAttention, GroupSemantics, LabelSemantics
from msrn_ray.model.msrn import ElementwiseHead, MLPHead
from msrn_ray.training.losses import classification_loss, group_loss
from msrn_ray.types import MSRNOutput

NUM_LABELS, VECTOR, WIDTH = 5, 6, 8
CHANNELS = {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512}
SUBSETS = [subset for size in range(1, 5) for subset in itertools.combinations(LEVELS, size)]
MASK = torch.eye(NUM_LABELS, dtype=torch.bool)
MASK[0, 1] = MASK[2, 0] = MASK[1, 3] = MASK[3, 1] = True  # label 4 stands alone


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def small(**change: Any) -> ModelSettings:
    settings = {
        "backbone": "resnet10",
        "pretrained": None,
        "head": "elementwise",
        "embed_dim": WIDTH,
        "label_hidden_dim": 7,
        "graph_hidden_dim": 9,
        "mlp_hidden_dim": 11,
        "group_ratio": 0.4,
    }
    return ModelSettings(**(settings | change))


def network(**change: Any) -> Any:
    torch.manual_seed(0)
    return build_model(small(**change), random(NUM_LABELS, VECTOR), MASK)


def total_loss(output: MSRNOutput, seed: int = 0) -> Tensor:
    target = torch.randint(0, 2, output.logits.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    return classification_loss(output.logits, target).mean() + group_loss(output)


@pytest.mark.parametrize("levels", SUBSETS, ids="-".join)
def test_any_levels_with_either_head(levels: tuple[str, ...]) -> None:
    images = random(2, 3, 64, 64)
    for head in ("mlp", "elementwise"):
        model = network(levels=levels, head=head)
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
        assert [tuple(one.shape) for one in features] == [(2, (sides[level] // 2) ** 2, WIDTH) for level in levels]


@torch.no_grad()
def test_forward_by_hand() -> None:
    """Buffer, 2x2 maximum, projection, attention, levels side by side, head."""
    model = network(levels=("layer2", "layer4")).eval()
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
    model = network(levels=("layer3", "layer4")).eval()
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
    model = build_model(small(group_ratio=ratio, levels=("layer1",)), random(num_labels, 3), torch.eye(num_labels) > 0)
    assert isinstance(model, MSRN)
    assert model.group_semantics.assign.weight.shape[1] == groups


@torch.no_grad()
def test_evaluation_repeats_and_images_do_not_interact() -> None:
    for name in ("msrn", "gap", "gmp"):
        model = network(name=name)
        model(random(2, 3, 64, 64, seed=9))  # moves the BatchNorm statistics
        model.eval()
        images = random(4, 3, 64, 64, seed=1)
        logits = model(images).logits
        assert torch.equal(logits, model(images).logits)
        alone = torch.cat([model(images[index : index + 1]).logits for index in (2, 0)])
        torch.testing.assert_close(logits[[2, 0]], alone, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(logits[0], logits[1]), "the images do not matter"


# backbone -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channels"),
    [("resnet10", (64, 128, 256, 512)), ("resnet18", (64, 128, 256, 512)), ("resnext50_32x4d", (256, 512, 1024, 2048))],
)
@torch.no_grad()
def test_backbone_levels(name: str, channels: tuple[int, ...]) -> None:
    backbone = Backbone(name, LEVELS).eval()
    assert tuple(backbone.channels[level] for level in LEVELS) == channels
    features = backbone(random(1, 3, 64, 96))
    assert [tuple(one.shape) for one in features] == [
        (1, width, 16 // 2**i, 24 // 2**i) for i, width in enumerate(channels)
    ]


@torch.no_grad()
def test_backbone_equals_torchvision() -> None:
    trunk = build_resnet("resnet18").eval()
    backbone = Backbone("resnet18", ("layer3", "layer4")).eval()
    backbone.load_state_dict({key: value for key, value in trunk.state_dict().items() if not key.startswith("fc.")})
    _, coarse = backbone(images := random(1, 3, 64, 64))
    torch.testing.assert_close(trunk.fc(coarse.mean((2, 3))), trunk(images))


@pytest.mark.parametrize("name", ["resnet11", "vit_b_16", "vgg16", ""])
def test_unknown_backbone_lists_the_known_names(name: str) -> None:
    with pytest.raises(UserError) as error:
        build_resnet(name)
    for part in (repr(name), "model.backbone", "resnet10", "resnet101", "resnext50_32x4d", "wide_resnet50_2"):
        assert part in str(error.value)
    assert "vit_b_16" not in str(error.value).replace(repr(name), "")


def step(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The backbone's entries before and after one optimizer step in train mode."""
    model.eval()
    model.train()  # as after an evaluation: what is frozen must stay so
    before = copy.deepcopy(model.backbone.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    total_loss(model(random(4, 3, 64, 64))).backward()
    optimizer.step()
    return before, model.backbone.state_dict()


def stage_of(entry: str) -> int:
    first = entry.split(".")[0]
    return STAGES.index(first) if first in STAGES else 0


@pytest.mark.parametrize("frozen", range(6))
def test_frozen_stages_do_not_change(frozen: int) -> None:
    model = network(frozen_stages=frozen, levels=LEVELS)
    before, after = step(model)
    for name, parameter in model.backbone.named_parameters():
        assert parameter.requires_grad == (stage_of(name) >= frozen), name
        assert (parameter.grad is not None) == (stage_of(name) >= frozen), name
    for name, value in before.items():
        assert torch.equal(value, after[name]) == (stage_of(name) < frozen), name
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "backbone" not in name)


def test_frozen_batchnorm_does_not_change() -> None:
    model = network(frozen_batchnorm=True, levels=("layer2",))
    before, after = step(model)
    norms = {
        f"{path}.{entry}"
        for path, module in model.backbone.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for entry in module.state_dict()
    }
    assert norms
    for name, value in before.items():
        assert torch.equal(value, after[name]) == (name in norms), name
    for name, parameter in model.backbone.named_parameters():
        assert parameter.requires_grad == (name not in norms), name


def test_freezing_all_stages_leaves_the_head() -> None:
    model = network(frozen_stages=5, levels=("layer1",))
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    total_loss(model(random(2, 3, 64, 64))).backward()
    assert model.projections["layer1"].weight.grad is not None


# label semantics ------------------------------------------------------------------------------------------------------


def graph_attention(layer: GraphAttention, nodes: Tensor, mask: Tensor) -> Tensor:
    """The layer's equations, label by label."""
    hidden = nodes @ layer.weight
    rows = []
    for i in range(len(nodes)):
        seen = [j for j in range(len(nodes)) if mask[i, j]]
        scores = []
        for j in seen:
            score = (layer.score[:, 0] * torch.cat([hidden[i], hidden[j]])).sum()
            scores.append(torch.where(score > 0, score, 0.2 * score))
        share = torch.stack(scores).exp()
        share = share / share.sum()
        summed = sum(weight * hidden[j] for weight, j in zip(share, seen, strict=True)) + hidden[i]
        rows.append(torch.where(summed > 0, summed, summed.exp() - 1))
    return torch.stack(rows)


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_graph_attention_equals_a_loop(seed: int) -> None:
    torch.manual_seed(seed)
    layer = GraphAttention(4, 6).double()
    nodes = random(7, 4, seed=seed, dtype=torch.float64)
    mask = (torch.rand(7, 7) < 0.4) | (torch.eye(7) > 0)
    assert not torch.equal(mask, mask.t())
    expected = graph_attention(layer, nodes, mask)
    torch.testing.assert_close(layer(nodes, mask), expected)
    assert not torch.allclose(layer(nodes, mask.t()), expected), "a transposed mask would not be noticed"


@torch.no_grad()
def test_initial_graph_weights_are_xavier_with_gain() -> None:
    layer = GraphAttention(200, 100)
    bound = 1.414 * math.sqrt(6 / 300)
    assert layer.weight.abs().max() == pytest.approx(bound, rel=0.01)
    assert layer.weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert layer.score.shape == (200, 1)
    assert layer.score.abs().max() == pytest.approx(1.414 * math.sqrt(6 / 201), rel=0.1)


@torch.no_grad()
def test_label_embedding_depends_on_graph_neighbours() -> None:
    torch.manual_seed(0)
    semantics = LabelSemantics(random(NUM_LABELS, VECTOR), MASK, hidden_dim=7, graph_hidden_dim=9, embed_dim=WIDTH)
    hidden = semantics.word_vectors @ semantics.input.weight.t() + semantics.input.bias
    expected = graph_attention(semantics.second, graph_attention(semantics.first, hidden, MASK), MASK)
    before = semantics()
    torch.testing.assert_close(before, expected)
    for changed in range(NUM_LABELS):
        semantics.word_vectors.copy_(random(NUM_LABELS, VECTOR))
        semantics.word_vectors[changed] += 3
        moved = {label for label in range(NUM_LABELS) if not torch.allclose(semantics()[label], before[label])}
        two_steps = (MASK.long() @ MASK.long())[:, changed].nonzero().flatten().tolist()
        assert moved == set(two_steps)
        assert (4 in moved) == (changed == 4), "the label that stands alone depends on itself only"


def test_learned_word_vectors_get_gradients() -> None:
    """The same network and state dict either way; learnt ones are a weight with a gradient of its own."""
    start = random(NUM_LABELS, VECTOR)
    before = start.clone()
    torch.manual_seed(0)
    model = build_model(small(), start, MASK, train_vectors=True)
    fixed = network()
    assert list(model.state_dict()) != []
    assert set(model.state_dict()) == set(fixed.state_dict())
    assert "label_semantics.word_vectors" in dict(model.named_parameters())
    assert "label_semantics.word_vectors" not in dict(fixed.named_parameters())
    images = random(2, 3, 64, 64)
    torch.testing.assert_close(model.eval()(images).logits, fixed.eval()(images).logits, rtol=0, atol=0)
    total_loss(model(images)).backward()
    gradient = model.label_semantics.word_vectors.grad
    assert gradient is not None
    assert (gradient.abs().sum(1) > 0).all(), "each label's vector learns"
    with torch.no_grad():
        model.label_semantics.word_vectors.add_(1)
    assert torch.equal(start, before), "the caller's tensor is not trained in place"


@torch.no_grad()
def test_group_embedding_and_assignment() -> None:
    torch.manual_seed(1)
    groups = GroupSemantics(WIDTH, 3)
    embedding = random(NUM_LABELS, WIDTH, seed=3)
    vectors, assignment = groups(embedding, MASK)
    nodes = embedding.clamp(min=0)
    expected = graph_attention(groups.assign, nodes, MASK).softmax(1)
    torch.testing.assert_close(assignment, expected)
    torch.testing.assert_close(vectors, expected.t() @ graph_attention(groups.embed, nodes, MASK))


# heads ----------------------------------------------------------------------------------------------------------------


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
    model = network(name=name, levels=("layer1",)).eval()
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
    model = network(levels=("layer4",), **change)
    frequency = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.3])
    before = model.eval()(random(1, 3, 64, 64)).logits
    old = (model.head.bias if "name" in change or change["head"] == "elementwise" else model.head.output.bias).clone()
    set_prior_bias(model, frequency)
    shift = model(random(1, 3, 64, 64)).logits - before + old
    torch.testing.assert_close(shift[0].sigmoid(), frequency, rtol=1e-3, atol=1e-4)


# pre-trained weights --------------------------------------------------------------------------------------------------


def half_state() -> dict[str, Tensor]:
    """A whole torchvision state dict in half precision, `fc` and all stages included."""
    torch.manual_seed(5)
    state = build_resnet("resnet10").state_dict()
    for name, value in state.items():
        if name.endswith("running_mean"):
            value.normal_()
    return {key: value.half() if value.is_floating_point() else value for key, value in state.items()}


@pytest.mark.parametrize("wrapped", [False, True])
def test_half_precision_file_becomes_float32(tmp_path: Path, wrapped: bool) -> None:
    state, path = half_state(), tmp_path / "weights.pth"
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, path)
    model = build_model(small(pretrained=str(path), levels=("layer2",)), random(NUM_LABELS, VECTOR), MASK)
    own = model.backbone.state_dict()
    assert own
    for key, value in own.items():
        assert value.dtype == (torch.float32 if state[key].is_floating_point() else torch.int64), key
        assert torch.equal(value, state[key].to(value.dtype)), key
    untouched = build_model(
        small(pretrained=str(path), levels=("layer2",)), random(NUM_LABELS, VECTOR), MASK, pretrained=False
    )
    assert not torch.equal(untouched.backbone.conv1.weight, model.backbone.conv1.weight)


def refused(path: Path | str, name: str = "resnet10", levels: tuple[str, ...] = ("layer4",)) -> str:
    backbone = Backbone(name, levels)
    before = copy.deepcopy(backbone.state_dict())
    with pytest.raises(UserError) as error:
        load_pretrained(backbone, name, str(path))
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items()), "half loaded"
    assert str(path) in str(error.value)
    assert "model.pretrained" in str(error.value)
    return str(error.value)


def test_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    state = half_state()
    torch.save({key: value for key, value in state.items() if key != "layer3.0.conv1.weight"}, path)
    message = refused(path)
    assert "1 entries missing" in message
    assert "layer3.0.conv1.weight" in message
    load_pretrained(Backbone("resnet10", ("layer2",)), "resnet10", str(path))  # the stage is not used there
    torch.save(state | {"layer1.0.conv2.weight": torch.zeros(64, 64, 1, 1)}, path)
    message = refused(path)
    assert "1 of another shape" in message
    assert "layer1.0.conv2.weight" in message


class Code:
    """Pickles as a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_file_without_state_dict_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "absent.pth")
    assert "no such file" in refused(tmp_path)
    path, trap = tmp_path / "weights.pth", tmp_path / "trap"
    torch.save(half_state() | {"extra": Code(trap)}, path)
    assert "not a plain state dict" in refused(path)
    path.write_bytes(pickle.dumps(Code(trap), protocol=2))
    assert "not a plain state dict" in refused(path)
    assert not trap.exists(), "code from a file was run"
    path.write_text("hello")
    assert "not a plain state dict" in refused(path)
    path.write_bytes(b"")
    assert "not a plain state dict" in refused(path)
    torch.save([torch.zeros(3)], path)
    assert "a state dict is expected, not list" in refused(path)


@pytest.mark.parametrize("state", [{"state_dict": 5}, {"state_dict": [torch.zeros(1)]}, {"conv1.weight": 3}])
def test_dict_without_tensors_is_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    path = tmp_path / "weights.pth"
    torch.save(half_state() | state, path)
    refused(path)


def test_file_without_batch_counters_loads(tmp_path: Path) -> None:
    """Torchvision's older files have no `num_batches_tracked`; nothing here depends on it."""
    path, state = tmp_path / "weights.pth", half_state()
    torch.save({key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}, path)
    backbone = Backbone("resnet10", ("layer4",))
    load_pretrained(backbone, "resnet10", str(path))
    assert torch.equal(backbone.layer4[0].conv1.weight, state["layer4.0.conv1.weight"].float())
    assert torch.equal(backbone.bn1.running_mean, state["bn1.running_mean"].float())


def test_unknown_weight_name_lists_the_known_names() -> None:
    message = refused("IMAGENET1K_V9", "resnet50")
    assert "IMAGENET1K_V1, IMAGENET1K_V2" in message
    with pytest.raises(UserError, match="there are no ImageNet weights for resnet10"):
        load_pretrained(Backbone("resnet10", ("layer1",)), "resnet10", "IMAGENET1K_V1")


@torch.no_grad()
def test_real_weights_load(shared: Path) -> None:
    """A file as others wrote it: half precision, all stages, `fc`."""
    path = shared / "weights/resnet18_imagenet_fp16.pth"
    model = build_model(
        small(backbone="resnet18", pretrained=str(path), levels=("layer4",)), random(NUM_LABELS, VECTOR), MASK
    )
    state = torch.load(path, weights_only=True)
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value.float(), state[key].float()), key
