"""The backbone: its levels, freezing, and pretrained weights."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msrn_ray.errors import UserError
from msrn_ray.model import build_model
from msrn_ray.model.backbone import STAGES, Backbone, build_resnet, load_pretrained
from msrn_ray.settings import LEVELS

from .networks import MASK, NUM_LABELS, VECTOR, random, small_network, small_settings, total_loss


@pytest.mark.parametrize(
    ("name", "channels"),
    [("resnet10", (64, 128, 256, 512)), ("resnet18", (64, 128, 256, 512)), ("resnext50_32x4d", (256, 512, 1024, 2048))],
)
@torch.no_grad()
def test_backbone_levels(name: str, channels: tuple[int, ...]) -> None:
    backbone = Backbone(name, LEVELS).eval()
    assert tuple(backbone.channels[level] for level in LEVELS) == channels
    features = backbone(random(1, 3, 64, 96))
    assert [tuple(feature.shape) for feature in features] == [
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
    """Return the backbone's entries before and after an optimizer step in train mode."""
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
    model = small_network(frozen_stages=frozen, levels=LEVELS)
    before, after = step(model)
    for name, parameter in model.backbone.named_parameters():
        assert parameter.requires_grad == (stage_of(name) >= frozen), name
        assert (parameter.grad is not None) == (stage_of(name) >= frozen), name
    for name, value in before.items():
        assert torch.equal(value, after[name]) == (stage_of(name) < frozen), name
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "backbone" not in name)


def test_frozen_batchnorm_does_not_change() -> None:
    model = small_network(frozen_batchnorm=True, levels=("layer2",))
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
    model = small_network(frozen_stages=5, levels=("layer1",))
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    total_loss(model(random(2, 3, 64, 64))).backward()
    assert model.projections["layer1"].weight.grad is not None


def half_state() -> dict[str, Tensor]:
    """Return a complete torchvision state dict in half precision, with `fc` and all stages."""
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
    model = build_model(small_settings(pretrained=str(path), levels=("layer2",)), random(NUM_LABELS, VECTOR), MASK)
    loaded = model.backbone.state_dict()
    assert loaded
    for key, value in loaded.items():
        assert value.dtype == (torch.float32 if state[key].is_floating_point() else torch.int64), key
        assert torch.equal(value, state[key].to(value.dtype)), key
    untouched = build_model(
        small_settings(pretrained=str(path), levels=("layer2",)), random(NUM_LABELS, VECTOR), MASK, pretrained=False
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
    """Pickles as a call that creates a file."""

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
    """A real file: half precision, all stages, `fc`."""
    path = shared / "weights/resnet18_imagenet_fp16.pth"
    model = build_model(
        small_settings(backbone="resnet18", pretrained=str(path), levels=("layer4",)), random(NUM_LABELS, VECTOR), MASK
    )
    state = torch.load(path, weights_only=True)
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value.float(), state[key].float()), key
