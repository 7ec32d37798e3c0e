"""The bundle, the directory that goes to the device. Standard library and numpy."""
