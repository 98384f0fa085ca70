"""Lets a user name the data instead of the preset: `msrn train PATH` is `msrn train PRESET --data.root PATH`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..presets import PRESETS

NAMING_COMMANDS = ("train", "search", "doctor", "graph", "prepare", "convert")


def name_data(argv: Sequence[str]) -> list[str]:
    """Return the command line with the preset and the root of the data, if its first argument is a file, folder or URI of data.

    Prints which preset reads the data, and why.

    Raises:
        UserError: if the format of the data is not recognised.
    """
    words = list(argv)
    if len(words) < 2 or words[0] not in NAMING_COMMANDS or words[1].startswith("-") or words[1] in PRESETS:
        return words
    if not os.path.exists(os.path.expanduser(words[1])) and "/" not in words[1]:
        return words  # probably a misspelt preset: the parser names them all
    from ..datasets.recognise import recognise
    from ..io.storage import Location

    found = recognise(Location.of(words[1]))
    print(f"{words[1]}: read as {found.preset}, because {found.reason}")
    return [words[0], found.preset, "--data.root", str(found.root), *words[2:]]
