"""`python -m msrn_ray` is the console command `msrn`."""

from .cli.app import main

if __name__ == "__main__":
    main()
