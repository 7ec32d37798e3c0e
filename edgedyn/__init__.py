"""edgedyn."""
