"""`python tuning/search.py [PRESET] [options]` is `msrn search [PRESET] [options]`."""

from __future__ import annotations

import sys


def main() -> None:
    """`python tuning/search.py ...` is `msrn search ...`."""
    from msrn_ray.cli.app import main as msrn

    sys.argv[1:1] = ["search"]
    msrn()


if __name__ == "__main__":
    main()
