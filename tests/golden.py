"""Regenerate the weights and images behind golden/msrn_voc.npz from their recipe, in the authors' naming."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
import torchvision

NUM_LABELS, NUM_GROUPS, EMBED_DIM, LEVELS = 20, 4, 512, 3


def official_shapes() -> dict[str, tuple[int, ...]]:
    """Return the shape of every entry of the authors' state dict for VOC."""
    trunk = torchvision.models.resnet101(weights=None).state_dict()
    shapes = {f"resnet_101.{name}": tuple(value.shape) for name, value in trunk.items() if not name.startswith("fc.")}
    for index, width in enumerate((256, 512, 1024)):
        shapes[f"resnet_101.conv_buffer{index}.weight"] = (width, width, 1, 1)
        shapes[f"resnet_101.conv_buffer{index}.bias"] = (width,)
    for index, width in enumerate((512, 1024, 2048)):
        shapes[f"ProjectM.{index}.weight"] = (EMBED_DIM, width, 1, 1)
        shapes[f"ProjectM.{index}.bias"] = (EMBED_DIM,)
    shapes |= {"fc_label.weight": (256, 300), "fc_label.bias": (256,)}
    for name, (wide, out) in {
        "label_embed.layers.0": (256, 300),
        "label_embed.layers.1": (300, EMBED_DIM),
        "group_embed.layers.0.embed": (EMBED_DIM, EMBED_DIM),
        "group_embed.layers.0.assign_mat": (EMBED_DIM, NUM_GROUPS),
    }.items():
        shapes |= {f"{name}.W": (wide, out), f"{name}.a": (2 * out, 1)}
    shapes |= {"fc1.weight": (2048, (NUM_LABELS + NUM_GROUPS) * LEVELS * EMBED_DIM), "fc1.bias": (2048,)}
    shapes |= {"fc2.weight": (NUM_LABELS, 2048), "fc2.bias": (NUM_LABELS,)}
    shapes |= {"W": (NUM_LABELS, 2 * LEVELS * EMBED_DIM), "B": (NUM_LABELS,)}
    return shapes


def official_state_dict(salt: int) -> dict[str, torch.Tensor]:
    """Return the golden run's weights; the name of an entry seeds its generator."""
    return {name: torch.from_numpy(_entry(name, shape, salt)) for name, shape in official_shapes().items()}


def _entry(name: str, shape: tuple[int, ...], salt: int) -> np.ndarray:
    rng = np.random.default_rng([zlib.crc32(name.encode()), salt])
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith("running_var"):
        value = rng.uniform(0.5, 1.5, shape)
    elif name.endswith("running_mean"):
        value = rng.standard_normal(shape) * 0.1
    elif ".bn" in name or "downsample.1" in name:
        value = rng.uniform(0.3, 0.7, shape) if name.endswith("weight") else rng.standard_normal(shape) * 0.1
    elif name.endswith("bias") or name == "B":
        value = rng.standard_normal(shape) * 0.1
    else:
        in_first = name.endswith((".W", ".a"))  # the release stores these as [in, out]
        fan = int(np.prod(shape[1:])) if len(shape) == 4 else shape[0] if in_first else shape[-1]
        value = rng.standard_normal(shape) * np.sqrt(2 / fan)
    return value.astype(np.float32)


def golden_images(salt: int, batch: int, image_size: int) -> torch.Tensor:
    """Return [batch, 3, image_size, image_size] float32, standard normal."""
    noise = np.random.default_rng([7, salt]).standard_normal((batch, 3, image_size, image_size))
    return torch.from_numpy(noise.astype(np.float32))


def load_golden(shared: Path) -> dict[str, np.ndarray]:
    """Return all arrays of the golden file."""
    with np.load(shared / "golden" / "msrn_voc.npz") as file:
        return {name: file[name] for name in file.files}
