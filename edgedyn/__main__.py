"""``python -m edgedyn``: the command line."""

from edgedyn.children import leave_working_directory

leave_working_directory()  # which `python -m` puts first; before anything else is imported

from edgedyn.cli.app import main  # noqa: E402

if __name__ == "__main__":
    main()
