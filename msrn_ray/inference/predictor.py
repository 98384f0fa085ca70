"""Turns a checkpoint and images into probabilities; torch only, no Ray.

Shapes: n images, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..datasets.transforms import decode, from_pil, normalize, resize
from ..errors import UserError
from ..labels.graph import attend_mask, choose_tau
from ..labels.word_vectors import LEARNED
from ..model import MSRN, PooledLinear, build_model
from ..runs.checkpoint import Checkpoint, load_checkpoint


def build_from_checkpoint(checkpoint: Checkpoint) -> MSRN | PooledLinear:
    """Return the checkpoint's network with its weights, in eval mode, on the CPU.

    Raises:
        UserError: if the weights do not fit the config: the file is damaged.
    """
    settings = checkpoint.config.model
    vectors = checkpoint.weights.get("label_semantics.word_vectors", torch.zeros(len(checkpoint.label_names), 1))
    mask = attend_mask(checkpoint.counts, choose_tau(checkpoint.counts, settings.tau, settings.tau_degree))
    learned = checkpoint.config.data.word_vectors == LEARNED
    model = build_model(settings, vectors, mask, pretrained=False, train_vectors=learned)
    try:
        model.load_state_dict(dict(checkpoint.weights))
    except RuntimeError as error:
        raise UserError(
            f"the checkpoint's weights do not fit its config ({' '.join(str(error).split())[:300]})"
        ) from None
    return model.eval()


def load_model(checkpoint: str | Path) -> MSRN | PooledLinear:
    """Return the network of a checkpoint, in eval mode.

    Args:
        checkpoint: a checkpoint folder, its `model.pt`, or a run folder (then its best checkpoint).

    Returns:
        A module whose `forward(images [B, 3, H, W] float32, normalised)` returns an `MSRNOutput`.

    Raises:
        UserError: if the checkpoint cannot be read safely.
    """
    return build_from_checkpoint(load_checkpoint(Path(checkpoint)))


class Predictor:
    """Scores images with a checkpoint.

    Attributes:
        label_names: C names, in the order of the columns that a call returns.
        thresholds: [C] float32, probabilities from which on a label counts as present.
        checkpoint: config, label names, counts and weights.
        device: where the model runs.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | None = None) -> None:
        self.checkpoint = checkpoint
        self.label_names = checkpoint.label_names
        self.thresholds = torch.tensor(checkpoint.thresholds)
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = build_from_checkpoint(checkpoint).to(self.device)

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: torch.device | None = None) -> Predictor:
        """Read a checkpoint folder, its `model.pt`, or a run folder; `device` is by default cuda if available, else the CPU."""
        return cls(load_checkpoint(Path(path)), device)

    def view(self, image: str | Path | bytes | Image.Image) -> Tensor:
        """Return the evaluation view [3, S, S] uint8 of a path, encoded bytes or a Pillow image.

        Raises:
            UserError: if the bytes cannot be decoded.
            OSError: if the file cannot be read.
        """
        settings = self.checkpoint.config.data
        if isinstance(image, Image.Image):
            pixels = from_pil(image)
        else:
            data = image if isinstance(image, bytes) else Path(image).read_bytes()
            pixels = decode(data, max_pixels=settings.max_pixels, short_side=settings.image_size)
        return resize(pixels, settings.image_size)

    @torch.inference_mode()
    def score(self, views: Tensor) -> Tensor:
        """Return [n, C] float32 probabilities, on the CPU; views: [n, 3, S, S] uint8."""
        images = normalize(views.to(self.device), self.checkpoint.mean, self.checkpoint.std)
        probabilities: Tensor = self.model(images).logits.float().sigmoid().cpu()
        return probabilities

    def __call__(
        self,
        images: str | Path | bytes | Image.Image | Sequence[str | Path | bytes | Image.Image],
        batch_size: int = 32,
    ) -> Tensor:
        """Return the probability of every label on every image.

        Args:
            images: n paths, encoded bytes or Pillow images. A single path, bytes or Pillow image is a sequence of 1.
            batch_size: decoded images in memory at once.

        Returns:
            [n, C] float32 in [0, 1].

        Raises:
            UserError, OSError: as `view`.
        """
        if isinstance(images, (str, Path, bytes, Image.Image)):
            images = [images]
        starts = range(0, len(images), batch_size)
        views = (torch.stack([self.view(image) for image in images[start : start + batch_size]]) for start in starts)
        return torch.cat([torch.zeros(0, len(self.label_names)), *map(self.score, views)])
