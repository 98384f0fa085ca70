"""`python tuning/search.py [PRESET] [options]` is `msrn search [PRESET] [options]`."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # this folder's modules are parts of a package; its parent holds the packages
    sys.path[: not sys.flags.safe_path] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    import msrn_ray.import_path

    if sys.flags.safe_path:
        del sys.path[0]
    msrn_ray.import_path.drop_first_folder()

    from msrn_ray.cli.app import main

    sys.argv[1:1] = ["search"]
    main()
