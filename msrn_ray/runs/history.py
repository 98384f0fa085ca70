"""The metrics of a run's epochs (metrics.jsonl), and the rule for the best epoch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..io.files import atomic_write

METRICS_FILE = "metrics.jsonl"


def to_json(values: Mapping[str, Any], indent: int | None = None) -> str:
    """Return plain values as JSON; nan becomes null, since JSON has no nan."""
    plain = {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}
    return json.dumps(plain, indent=indent)


def write_history(path: Path, history: list[dict[str, Any]]) -> None:
    """Write metrics.jsonl, one line per epoch."""
    with atomic_write(path) as partial:
        partial.write_text("".join(to_json(line) + "\n" for line in history), encoding="utf-8")


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of metrics.jsonl, null as nan; no lines if there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    complete = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may have cut off the last line
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in complete]


def best_index(scores: Sequence[float]) -> int:
    """Return the index of the largest score, of equal scores the last, as Ray Train keeps it; nan loses to any number."""
    return max(range(len(scores)), key=lambda index: (not math.isnan(scores[index]), scores[index], index))
