"""The directory that travels. Standard library and numpy."""
