"""The point that a trial runs, as it crosses processes; this module imports neither Optuna nor Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrialPoint:
    """A trial's number in its study, and the config overrides that it trains with; its fields are Ray Tune's config of the trial."""

    number: int
    overrides: dict[str, Any]


def trial_name(number: int) -> str:
    """Return the name of a trial's run folder; a second run of that name resumes from its last checkpoint."""
    return f"trial_{number:04d}"
