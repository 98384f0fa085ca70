"""`msrn import-official`: an authors' checkpoint file becomes a normal checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from .checkpoint import Checkpoint, save_checkpoint
from .config import LEVELS
from .errors import UserError
from .label_graph import attend_mask, choose_tau, load_counts
from .label_names import LABEL_NAMES
from .model import build_model
from .official import convert_state_dict, read_official
from .presets import PRESETS
from .word_vectors import load_word_vectors


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
