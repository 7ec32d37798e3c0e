"""What a user types, one file a command, and how results are printed."""
