"""Rounding of weights, and the corrections after it."""
