"""Evaluation and the choice of the best epoch, as far as they need no Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from msrn_ray.errors import UserError
from msrn_ray.ray_train.evaluate import check_labels
from msrn_ray.runs.checkpoint import load_checkpoint
from msrn_ray.runs.history import best_index
from tests.tiny import make_tiny_checkpoint

NAN = float("nan")


def test_other_labels_are_refused_with_the_difference(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(make_tiny_checkpoint(tmp_path / "tiny"))
    names = checkpoint.label_names
    check_labels(checkpoint, names, "tiny")
    with pytest.raises(UserError, match="tiny has the data set's labels in another order"):
        check_labels(checkpoint, names[::-1], "tiny")
    with pytest.raises(UserError, match=rf"only in the checkpoint: {names[0]};.*only in the data set: new"):
        check_labels(checkpoint, ("new", *names[1:]), "tiny")
    with pytest.raises(UserError, match="another order"):
        check_labels(replace(checkpoint, label_names=names[::-1]), names, "tiny")


@pytest.mark.parametrize(
    ("scores", "best"), [([NAN, 0.3, 0.3, 0.2], 2), ([0.5, NAN], 0), ([NAN, NAN], 1), ([0.1, 0.2], 1), ([0.2, 0.1], 0)]
)
def test_last_best_epoch_wins_and_nan_never(scores: list[float], best: int) -> None:
    assert best_index(scores) == best
