"""The names of the splits, and the words that users write for them."""

from __future__ import annotations

from typing import Literal, get_args

SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
SPLIT_WORDS: dict[str, SplitName] = {  # lower case
    **{"train": "train", "training": "train"},
    **{"val": "val", "valid": "val", "validation": "val", "dev": "val"},
    **{"test": "test", "testing": "test"},
}
