"""A torchvision ResNet, ResNeXt or Wide-ResNet that returns the features of several stages.

Shapes: B images, S input side. With ResNet-101 at S = 448: layer1 [B,256,112,112], layer2 [B,512,56,56], layer3 [B,1024,28,28],
layer4 [B,2048,14,14].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from ..errors import UserError
from ..settings import LEVELS

STAGES = ("stem", *LEVELS)
FAMILY = ("resnet", "resnext", "wide_resnet")


class Backbone(nn.Module):
    """Stem and stages up to the deepest of `levels`. Deeper stages are dropped, so that every parameter gets a gradient.

    Args:
        name: a torchvision ResNet, ResNeXt or Wide-ResNet, or `resnet10`.
        levels: stages whose features are returned, fine to coarse.
        frozen_stages: how many of stem, layer1, ... keep their weights and BatchNorm statistics.
        frozen_batchnorm: keep all BatchNorm statistics and affine weights.
    """

    def __init__(
        self, name: str, levels: Sequence[str], *, frozen_stages: int = 0, frozen_batchnorm: bool = False
    ) -> None:
        super().__init__()
        trunk = build_resnet(name)
        self.levels = tuple(levels)
        self.depth = STAGES.index(self.levels[-1])
        self.frozen_stages = min(frozen_stages, self.depth + 1)
        self.frozen_batchnorm = frozen_batchnorm
        self.conv1, self.bn1, self.relu, self.maxpool = trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool
        for stage in STAGES[1 : self.depth + 1]:
            self.add_module(stage, getattr(trunk, stage))
        self.channels: dict[str, int] = {level: _width(getattr(trunk, level)) for level in self.levels}
        for module in self._frozen_modules():
            module.requires_grad_(False)
        self.train()

    def _frozen_modules(self) -> list[nn.Module]:
        frozen: list[nn.Module] = [self.conv1, self.bn1] if self.frozen_stages else []
        frozen += [getattr(self, stage) for stage in STAGES[1 : self.frozen_stages]]
        if self.frozen_batchnorm:
            frozen += [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        return frozen

    def train(self, mode: bool = True) -> Backbone:
        """Like `nn.Module.train`, but frozen modules stay in eval mode, so that their BatchNorm statistics do not move."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return [B, channels, h, w] per level, fine to coarse; images: [B, 3, H, W] float, normalised."""
        features = []
        out = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for stage in STAGES[1 : self.depth + 1]:
            out = getattr(self, stage)(out)
            if stage in self.levels:
                features.append(out)
        return features


def _width(stage: nn.Module) -> int:
    last = list(stage.children())[-1]
    norm = getattr(last, "bn3", None) or last.bn2  # a bottleneck or a basic block
    assert isinstance(norm, nn.BatchNorm2d)
    return norm.num_features


def build_resnet(name: str) -> ResNet:
    """Return a randomly initialised torchvision model of the ResNet family.

    Raises:
        UserError: for any other name; lists the known names.
    """
    if name == "resnet10":
        return ResNet(BasicBlock, [1, 1, 1, 1])
    known = [model for model in torchvision.models.list_models(torchvision.models) if model.startswith(FAMILY)]
    if name not in known:
        raise UserError(f"model.backbone {name!r} is not known; give one of resnet10, {', '.join(known)}")
    model: ResNet = torchvision.models.get_model(name, weights=None)
    return model


def load_pretrained(backbone: Backbone, name: str, source: str) -> None:
    """Fill the backbone from a torchvision weight name (downloaded) or a state-dict file in torchvision's naming.

    Half precision becomes float32. Entries of dropped stages and of `fc` are ignored; no entry of the backbone may be missing.

    Raises:
        UserError: if the file is missing, is not a plain state dict, or does not fit the backbone.
    """
    state = read_pretrained(name, source)
    expected = backbone.state_dict()
    # files of older torch versions do not count batches
    counters = {key: torch.zeros_like(value) for key, value in expected.items() if key.endswith("num_batches_tracked")}
    state = counters | dict(state)
    missing = [key for key in expected if key not in state]
    wrong = [key for key in expected if key in state and getattr(state[key], "shape", None) != expected[key].shape]
    if missing or wrong:
        example = (missing + wrong)[0]
        raise UserError(
            f"model.pretrained {source}: does not fit {name} ({len(missing)} entries missing, {len(wrong)} of another shape,"
            f" e.g. {example}); give weights of that architecture in torchvision's naming"
        )
    backbone.load_state_dict({key: state[key] for key in expected})


def read_pretrained(name: str, source: str) -> Mapping[str, Tensor]:
    """Return the float32 state dict that `source` names; see `load_pretrained`."""
    path = Path(source).expanduser()
    if path.suffix in {".pth", ".pt", ".tar"} or path.exists():
        if not path.is_file():
            raise UserError(
                f"model.pretrained {path}: no such file; give a state-dict file, a torchvision weight name or None"
            )
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds; all of them mean that it is not a safe state dict
            raise UserError(
                f"model.pretrained {path}: not a plain state dict of tensors ({_first_line(error)})"
            ) from None
        if not isinstance(state, dict):
            raise UserError(f"model.pretrained {path}: a state dict is expected, not {type(state).__name__}")
        state = state.get("state_dict", state)
        if not isinstance(state, dict):
            raise UserError(
                f"model.pretrained {path}: its state_dict is not a dict of tensors but {type(state).__name__}"
            )
    elif name == "resnet10":
        raise UserError(
            "model.pretrained: there are no ImageNet weights for resnet10; give a file, or None for random weights"
        )
    else:
        known = torchvision.models.get_model_weights(name)
        if source not in known.__members__:
            names = ", ".join(weight.name for weight in known)
            raise UserError(f"model.pretrained {source!r}: no such file or weights; {name} has the weights {names}")
        try:
            state = known[source].get_state_dict(progress=False, check_hash=True)
        except OSError as error:  # URLError included
            raise UserError(
                f"model.pretrained {source}: could not be downloaded ({_first_line(error)}); give a file, or None for random weights"
            ) from None
    return {
        key: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in state.items()
    }


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
