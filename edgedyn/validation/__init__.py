"""Each step against the one before, and against the truth."""
