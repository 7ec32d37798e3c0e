"""Validation of a build: each program against the one before it, and against the truth."""
