"""`python -m msrn_ray` is the console command `msrn`."""

from .import_path import drop_first_folder

if __name__ == "__main__":
    drop_first_folder()

from .cli.app import main  # after the folder is dropped

if __name__ == "__main__":
    main()
