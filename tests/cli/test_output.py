"""What commands print."""

from __future__ import annotations

import shlex

from msrn_ray.cli.app import COMMANDS
from msrn_ray.cli.output import train_command
from msrn_ray.cli.parser import parse
from msrn_ray.presets import PRESETS


def test_train_command_parses_to_the_same_data() -> None:
    changes = {
        **{"data.root": "my data/labels.csv", "data.label_separator": ";", "data.test_fraction": 0.25},
        **{"data.flip": False, "data.keep_unlabelled_train": False, "data.crop_scales": [1.0, 0.5]},
    }
    data = PRESETS["manifest"].config.with_overrides(changes).data
    command = train_command("manifest", data)
    assert "'my data/labels.csv'" in command
    assert parse(COMMANDS, shlex.split(command)[1:]).experiment.data == data
    assert train_command("scenes", PRESETS["scenes"].config.data) == "msrn train scenes"
