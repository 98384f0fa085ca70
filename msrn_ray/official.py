"""`msrn import-official`: an authors' checkpoint file becomes a normal checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .config import LEVELS
from .datasets.apparel import APPAREL_LABELS
from .datasets.nuswide import NUSWIDE_LABELS
from .datasets.voc import VOC_LABELS
from .errors import UserError
from .labels.graph import attend_mask, choose_tau, load_counts
from .labels.word_vectors import load_word_vectors
from .model import build_model
from .presets import PRESETS
from .runs.checkpoint import Checkpoint, save_checkpoint


def import_official(
    file: Path, preset: str, *, word_vectors: Path, graph: Path, out: Path, levels: int = 3
) -> tuple[str, ...]:
    """Converts and writes; see `official` for the names.

    Args:
        file: the authors' .pth.tar.
        preset: whose label names, group ratio and input size it has.
        word_vectors: GloVe text or .npz; the same 300-wide vectors that it was trained with.
        graph: .npz with `names`, `adj`, `nums`.
        out: the new checkpoint folder.
        levels: backbone stages used, counted from the deepest.

    Returns:
        The C label names.

    Raises:
        UserError: if a file cannot be read, the folder exists, or the tensors do not fit the preset.
    """
    if out.exists():
        raise UserError(f"--out {out}: exists already; give a new folder")
    if preset not in LABEL_NAMES:
        raise UserError(f"--preset {preset}: the authors trained on {', '.join(LABEL_NAMES)}")
    names = LABEL_NAMES[preset]
    converted = convert_state_dict(read_official(file), levels=levels)
    head = "mlp" if "head.hidden.weight" in converted else "elementwise"
    config = PRESETS[preset].config.with_overrides(
        {
            "model.levels": LEVELS[-levels:],
            "model.head": head,
            "model.pretrained": None,
            "data.word_vectors": str(word_vectors.resolve()),
        }
    )
    counts = load_counts(graph, names)
    vectors, _ = load_word_vectors(names, str(word_vectors.resolve()))
    mask = attend_mask(counts, choose_tau(counts, config.model.tau, config.model.tau_degree))
    with torch.device("meta"):  # shapes alone are needed, not 264 M random weights
        own = build_model(config.model, vectors, mask).state_dict()
    weights = converted | {"label_semantics.word_vectors": vectors, "label_semantics.attend_mask": mask}
    wrong = [
        f"{name} is {tuple(weights[name].shape) if name in weights else 'missing'}, not {tuple(own[name].shape)}"
        for name in own
        if name not in weights or weights[name].shape != own[name].shape
    ]
    if wrong:
        raise UserError(f"{file}: does not fit preset {preset} ({len(names)} labels): {'; '.join(wrong[:3])}")
    if not all(torch.isfinite(tensor).all() for tensor in weights.values() if tensor.is_floating_point()):
        raise UserError(f"{file}: holds weights that are not finite")
    save_checkpoint(out, Checkpoint(config, names, counts, weights, (0.5,) * len(names), {}, 0))
    return names


COCO_LABELS = (
    "airplane", "apple", "backpack", "banana", "baseball bat", "baseball glove", "bear", "bed", "bench", "bicycle",
    "bird", "boat", "book", "bottle", "bowl", "broccoli", "bus", "cake", "car", "carrot", "cat", "cell phone",
    "chair", "clock", "couch", "cow", "cup", "dining table", "dog", "donut", "elephant", "fire hydrant", "fork",
    "frisbee", "giraffe", "hair drier", "handbag", "horse", "hot dog", "keyboard", "kite", "knife", "laptop",
    "microwave", "motorcycle", "mouse", "orange", "oven", "parking meter", "person", "pizza", "potted plant",
    "refrigerator", "remote", "sandwich", "scissors", "sheep", "sink", "skateboard", "skis", "snowboard", "spoon",
    "sports ball", "stop sign", "suitcase", "surfboard", "teddy bear", "tennis racket", "tie", "toaster", "toilet",
    "toothbrush", "traffic light", "train", "truck", "tv", "umbrella", "vase", "wine glass", "zebra",
)  # fmt: skip
LABEL_NAMES: dict[str, tuple[str, ...]] = {
    "voc2007": VOC_LABELS,
    "coco2014": COCO_LABELS,
    "nuswide": NUSWIDE_LABELS,
    "apparel": APPAREL_LABELS,
}
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
