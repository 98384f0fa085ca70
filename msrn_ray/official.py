"""Reads checkpoints of the authors' PyTorch release of MSRN.

The names are those found in the released files; see `convert_state_dict`. Label order there: VOC, COCO alphabetical by name;
NUS-WIDE and Apparel in the release's own order, which the readers here keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .config import LEVELS
from .errors import UserError

_PARTS = {
    "fc_label.weight": "label_semantics.input.weight",
    "fc_label.bias": "label_semantics.input.bias",
    "label_embed.layers.0.W": "label_semantics.first.weight",
    "label_embed.layers.0.a": "label_semantics.first.score",
    "label_embed.layers.1.W": "label_semantics.second.weight",
    "label_embed.layers.1.a": "label_semantics.second.score",
    "group_embed.layers.0.embed.W": "group_semantics.embed.weight",
    "group_embed.layers.0.embed.a": "group_semantics.embed.score",
    "group_embed.layers.0.assign_mat.W": "group_semantics.assign.weight",
    "group_embed.layers.0.assign_mat.a": "group_semantics.assign.score",
}
_MLP = {
    "fc1.weight": "head.hidden.weight",
    "fc1.bias": "head.hidden.bias",
    "fc2.weight": "head.output.weight",
    "fc2.bias": "head.output.bias",
}
_ELEMENTWISE = {"W": "head.weight", "B": "head.bias"}


def convert_state_dict(official: Mapping[str, Tensor], *, levels: int = 3) -> dict[str, Tensor]:
    """Renames the tensors of an authors' `state_dict` to this package's names.

    Args:
        official: the released names, with or without the prefix `module.`.
        levels: how many of the deepest backbone stages the model uses; 3 (layer2 to layer4) in the release.

    Returns:
        Every parameter and BatchNorm statistic of `model.MSRN` (its two buffers, word vectors and graph mask, are not in the
        released files). What the release never uses is left out: `conv_buffer0`, `ProjectMs`, and `W`, `B` where `fc1` is there.
        Float tensors become float32, untouched otherwise.

    Raises:
        UserError: if a tensor is missing or one is there that the release does not have.
    """
    if not 1 <= levels <= len(LEVELS):
        raise UserError(f"levels={levels}: a number from 1 to {len(LEVELS)} is expected")
    used = LEVELS[-levels:]
    source = {name.removeprefix("module."): tensor for name, tensor in official.items()}
    names = dict(_PARTS)
    for index, level in enumerate(used):
        for kind in ("weight", "bias"):
            names[f"ProjectM.{index}.{kind}"] = f"projections.{level}.{kind}"
            if level != "layer4":
                names[f"resnet_101.conv_buffer{LEVELS.index(level)}.{kind}"] = f"buffer_convs.{level}.{kind}"
    names |= _MLP if "fc1.weight" in source else _ELEMENTWISE
    missing = [name for name in names if name not in source]
    if missing:
        raise UserError(
            f"not an MSRN state dict of {levels} levels: {', '.join(missing[:4])} missing ({len(missing)} in all)"
        )
    converted = {}
    for name, tensor in source.items():
        if name.startswith(("resnet_101.conv_buffer", "ProjectMs.")) or name in _ELEMENTWISE:
            target = names.get(name)
        else:
            target = names.get(name) or (
                name.replace("resnet_101.", "backbone.", 1) if name.startswith("resnet_101.") else None
            )
            if target is None:
                raise UserError(f"not an MSRN state dict: {name!r} is not a name of the release")
        if target is not None:
            converted[target] = tensor.float() if tensor.is_floating_point() else tensor
    return converted


def read_official(path: Path) -> dict[str, Tensor]:
    """The `state_dict` of an authors' checkpoint file (`epoch`, `arch`, `state_dict`, `best_score`); runs no code from it.

    Raises:
        UserError: if the file is missing, would run code, or holds no `state_dict`.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the .pth.tar of the authors' release")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here; all of them mean: not safely readable
        raise UserError(
            f"{path}: cannot be read without running code from it, refused ({str(error).splitlines()[0]})"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{path}: holds no 'state_dict'; give the .pth.tar of the authors' release")
    state: dict[str, Tensor] = content["state_dict"]
    return state
