"""`python tuning/search.py [PRESET] [options]` is `msrn search [PRESET] [options]`."""

from __future__ import annotations

import sys

from msrn_ray.cli.app import main

if __name__ == "__main__":
    sys.argv[1:1] = ["search"]
    main()
