"""Keeps files of the working directory from being imported in place of packages.

Python puts the working directory (`python -m`) or the script's folder (`python tuning/search.py`) first in `sys.path`. A user's numpy.py or
tuning.py there would replace the package of that name.
"""

from __future__ import annotations

import importlib
import os
import sys

PACKAGE_ROOT = os.path.dirname(
    os.path.dirname(os.path.abspath(__file__))
)  # pathlib could still come from the working directory


def drop_first_folder() -> None:
    """Remove the folder that Python put first in `sys.path`; msrn_ray and tuning stay importable, also from a source checkout.

    Call it before other imports, and only in the script or module that Python was started with.
    """
    if not sys.flags.safe_path:
        del sys.path[0]
    sys.path.insert(0, PACKAGE_ROOT)
    try:
        importlib.import_module("tuning")  # from here on sys.modules holds it, whatever other folders hold
    finally:
        del sys.path[0]
    if PACKAGE_ROOT not in sys.path:
        sys.path.append(PACKAGE_ROOT)  # last: a checkout may hold files named like packages too
