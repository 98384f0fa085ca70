"""The point that a trial runs, as it crosses processes; this module imports neither Optuna nor Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrialPoint:
    """A trial's number in its study, and the config overrides that it trains with."""

    number: int
    overrides: dict[str, Any]

    @classmethod
    def from_tune(cls, config: Mapping[str, Any]) -> TrialPoint:
        """Return the point in the config of a Ray Tune trial, which has to be a dict."""
        return cls(config["number"], config["overrides"])

    def to_tune(self) -> dict[str, Any]:
        """Return the point as the config of a Ray Tune trial."""
        return {"number": self.number, "overrides": self.overrides}


def trial_name(number: int) -> str:
    """Return the name of a trial's run folder; a second run of that name resumes from its last checkpoint."""
    return f"trial_{number:04d}"
