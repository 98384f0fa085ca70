"""The metrics of a run's epochs (metrics.jsonl), and which epoch is the best one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def to_json(values: Mapping[str, Any], indent: int | None = None) -> str:
    """Plain values as JSON; nan becomes null, since JSON has no nan."""
    plain = {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}
    return json.dumps(plain, indent=indent)


def write_history(path: Path, history: list[dict[str, Any]]) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text("".join(to_json(line) + "\n" for line in history), encoding="utf-8")
    os.replace(partial, path)


METRICS_FILE = "metrics.jsonl"


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole, null as nan; none where there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    whole = [json.loads(line) for line in lines if line.endswith("}")]  # a line cut by a kill ends otherwise
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in whole]


def best_index(scores: Sequence[float]) -> int:
    """The place of the largest score, the last of equals as Ray Train keeps it; nan loses to any number."""
    return max(range(len(scores)), key=lambda index: (not math.isnan(scores[index]), scores[index], index))
