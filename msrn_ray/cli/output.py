"""What several commands print."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..data_settings import DataSettings
from ..presets import PRESETS


def new_console() -> Console:
    """Return the console for results: it neither colours names and numbers nor breaks lines."""
    return Console(highlight=False, soft_wrap=True)


def from_here(path: Path) -> Path:
    """Return the path as a user types it in the working directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def train_command(preset: str, data: DataSettings) -> str:
    """Return the command that trains on these data: a preset, and an option for each setting that differs from it."""
    usual = PRESETS[preset].config.data
    words = ["msrn", "train", preset]
    for name in type(data).model_fields:
        value, option = getattr(data, name), name.replace("_", "-")
        if value == getattr(usual, name):
            continue
        if isinstance(value, bool):
            words.append(f"--data.{'' if value else 'no-'}{option}")
        else:
            words += [f"--data.{option}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


def print_summary(out: Console, metrics: Mapping[str, Any]) -> None:
    """Print precision, recall, F1 and mAP of each split in `metrics` (`split/name`)."""
    splits = sorted({name.split("/")[0] for name in metrics if "/" in name}, key=("train", "val", "test").index)
    rows = {"at 0.5": "", "top-3": "_top3", "top-3, >= 0.5": "_top3_at_0.5"}
    for split in splits:
        values = {
            name.removeprefix(f"{split}/"): value for name, value in metrics.items() if name.startswith(f"{split}/")
        }
        if "mAP" not in values:
            continue
        table = Table(split, "CP", "CR", "CF1", "OP", "OR", "OF1")
        for row, suffix in rows.items():
            table.add_row(row, *(f"{values[name + suffix]:.4f}" for name in ("CP", "CR", "CF1", "OP", "OR", "OF1")))
        out.print(table)
        out.print(
            f"{split}: mAP {values['mAP']:.4f}, VOC 11-point {values['mAP_voc11']:.4f}, envelope {values['mAP_envelope']:.4f}"
        )
        if values["OR"] == 0:
            out.print(
                f"{split}: F1 at 0.5 is 0 because no correct label has reached a probability of 0.5; train longer, or rank labels by"
                " probability as mAP does"
            )
