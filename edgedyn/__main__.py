"""``python -m edgedyn``: the command line."""

from edgedyn.cli.app import main

if __name__ == "__main__":
    main()
