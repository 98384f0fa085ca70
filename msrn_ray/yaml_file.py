"""Reading a YAML file that a user wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .errors import UserError


def read_yaml(path: Path, name: str) -> Any:
    """What a YAML file holds; JSON is YAML too.

    Args:
        path: the file.
        name: what to call it in errors.

    Raises:
        UserError: if it cannot be read or is not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: not YAML or JSON ({' '.join(str(error).split())})") from None
