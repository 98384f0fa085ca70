"""The authors' checkpoints: their label names, and how a released file becomes a checkpoint of this package.

`read_official` loads a file without running code from it, `convert_state_dict` renames its tensors, `import_official` does both, checks
that the result fits a preset and writes the checkpoint.

Source: the authors' PyTorch release of MSRN (arXiv 2106.11596), whose names and label orders these are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from .config import ExperimentConfig
from .data_settings import Dataset
from .datasets.apparel import APPAREL_LABELS
from .datasets.nuswide import NUSWIDE_LABELS
from .datasets.voc import VOC_LABELS
from .errors import UserError
from .labels.graph import attend_mask, choose_tau, load_counts
from .labels.word_vectors import load_word_vectors
from .model import build_model
from .presets import PRESETS
from .runs.checkpoint import Checkpoint, save_checkpoint
from .settings import LEVELS

# the 80 names of COCO's objects, alphabetical, unlike COCO's category ids
_COCO_CATEGORIES = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
COCO_LABELS = tuple(sorted(set(_COCO_CATEGORIES) - {"__background__", "N/A"}))
LABEL_NAMES: dict[Dataset, tuple[str, ...]] = {
    "voc": VOC_LABELS,
    "coco": COCO_LABELS,
    "nuswide": NUSWIDE_LABELS,
    "apparel": APPAREL_LABELS,
}

# released name -> name in `model.MSRN`
_GRAPH_ATTENTION = {
    "label_embed.layers.0": "label_semantics.first",
    "label_embed.layers.1": "label_semantics.second",
    "group_embed.layers.0.embed": "group_semantics.embed",
    "group_embed.layers.0.assign_mat": "group_semantics.assign",
}
_MLP = {"fc1": "head.hidden", "fc2": "head.output"}
_ELEMENTWISE = {"W": "head.weight", "B": "head.bias"}


def read_official(path: Path) -> dict[str, Tensor]:
    """Return the `state_dict` of an authors' file (`epoch`, `arch`, `state_dict`, `best_score`) without running code from it.

    Raises:
        UserError: if the file is missing, would run code, or holds no `state_dict`.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the .pth.tar of the authors' release")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; all of them mean that the file is not safe to read
        raise UserError(
            f"{path}: cannot be read without running code from it, refused ({str(error).splitlines()[0]});"
            " give the .pth.tar of the authors' release"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{path}: holds no 'state_dict'; give the .pth.tar of the authors' release")
    state: dict[str, Tensor] = content["state_dict"]
    return state


def convert_state_dict(official: Mapping[str, Tensor], *, levels: int = 3) -> dict[str, Tensor]:
    """Rename the tensors of an authors' `state_dict` to this package's names.

    Args:
        official: the released names, with or without the prefix `module.`.
        levels: how many of the deepest backbone stages the model uses; 3 (layer2 to layer4) in the release.

    Returns:
        Every parameter and BatchNorm statistic of `model.MSRN`. Its two buffers, word vectors and graph mask, are not in the released
        files. What the release never uses is left out: `conv_buffer0`, `ProjectMs`, and `W`, `B` where `fc1` exists.
        Float tensors become float32; nothing else changes.

    Raises:
        UserError: if a tensor is missing, or a name is not one of the release's.
    """
    if not 1 <= levels <= len(LEVELS):
        raise UserError(f"levels={levels}: a number from 1 to {len(LEVELS)} is expected")
    source = {name.removeprefix("module."): tensor for name, tensor in official.items()}
    has_mlp = "fc1.weight" in source
    names = {} if has_mlp else dict(_ELEMENTWISE)
    for old, new in _GRAPH_ATTENTION.items():
        names |= {f"{old}.W": f"{new}.weight", f"{old}.a": f"{new}.score"}
    layers = {"fc_label": "label_semantics.input"} | (_MLP if has_mlp else {})
    for index, level in enumerate(LEVELS[-levels:]):
        layers[f"ProjectM.{index}"] = f"projections.{level}"
        if level != "layer4":
            layers[f"resnet_101.conv_buffer{LEVELS.index(level)}"] = f"buffer_convs.{level}"
    names |= {f"{old}.{part}": f"{new}.{part}" for old, new in layers.items() for part in ("weight", "bias")}
    missing = [name for name in names if name not in source]
    if missing:
        raise UserError(
            f"not an MSRN state dict of {levels} levels: {', '.join(missing[:4])} missing ({len(missing)} in all)"
        )
    converted = {}
    for name, tensor in source.items():
        target = names.get(name)
        unused = name.startswith(("resnet_101.conv_buffer", "ProjectMs.")) or name in _ELEMENTWISE
        if target is None and not unused:
            if not name.startswith("resnet_101."):
                raise UserError(f"not an MSRN state dict: {name!r} is not a name of the release")
            target = name.replace("resnet_101.", "backbone.", 1)
        if target is not None:
            converted[target] = tensor.float() if tensor.is_floating_point() else tensor
    return converted


def import_official(
    file: Path, preset: str, *, word_vectors: Path, graph: Path, out: Path, levels: int = 3
) -> tuple[str, ...]:
    """Convert an authors' file and write it as a checkpoint.

    Args:
        file: the authors' .pth.tar.
        preset: benchmark that gives label names, group ratio and input size.
        word_vectors: GloVe text or .npz; the 300-wide vectors that the file was trained with.
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
    trained = [name for name, known in PRESETS.items() if known.config.data.dataset in LABEL_NAMES]
    if preset not in trained:
        raise UserError(f"--preset {preset}: the authors trained on {', '.join(trained)}; give one of these")
    names = LABEL_NAMES[PRESETS[preset].config.data.dataset]
    converted = convert_state_dict(read_official(file), levels=levels)
    config = PRESETS[preset].config.with_overrides(
        {
            "model.levels": LEVELS[-levels:],
            "model.head": "mlp" if "head.hidden.weight" in converted else "elementwise",
            "model.pretrained": None,
            "data.word_vectors": str(word_vectors.resolve()),
        }
    )
    counts = load_counts(graph, names)
    vectors, _ = load_word_vectors(names, str(word_vectors.resolve()))
    mask = attend_mask(counts, choose_tau(counts, config.model.tau, config.model.tau_degree))
    weights = converted | {"label_semantics.word_vectors": vectors, "label_semantics.attend_mask": mask}
    _check_weights(file, config, weights)
    save_checkpoint(out, Checkpoint(config, names, counts, weights, (0.5,) * len(names), {}, 0))
    return names


def _check_weights(file: Path, config: ExperimentConfig, weights: Mapping[str, Tensor]) -> None:
    """Raise UserError if an entry of the model is missing, has another shape, or is not finite."""
    vectors, mask = weights["label_semantics.word_vectors"], weights["label_semantics.attend_mask"]
    with torch.device("meta"):  # only shapes are needed, not 264 M random weights
        expected = build_model(config.model, vectors, mask).state_dict()
    wrong = [
        f"{name} is {tuple(weights[name].shape) if name in weights else 'missing'}, not {tuple(expected[name].shape)}"
        for name in expected
        if name not in weights or weights[name].shape != expected[name].shape
    ]
    if wrong:
        raise UserError(
            f"{file}: does not fit preset {config.preset} ({len(vectors)} labels): {'; '.join(wrong[:3])};"
            " give the preset, levels and word vectors that it was trained with"
        )
    if not all(torch.isfinite(tensor).all() for tensor in weights.values() if tensor.is_floating_point()):
        raise UserError(f"{file}: holds weights that are not finite; give another file")
