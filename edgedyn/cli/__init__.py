"""The command line: one file per command, with the printing of its results."""
