"""`python tuning/search.py [PRESET] [options]` is `msrn search [PRESET] [options]`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run `msrn search` with this script's arguments."""
    from msrn_ray.cli.app import main as msrn

    sys.argv[1:1] = ["search"]
    msrn()


if __name__ == "__main__":
    main()
