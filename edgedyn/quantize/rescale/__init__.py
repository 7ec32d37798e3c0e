"""Exact rewrites that bring the channels of an activation to one range before it is quantized."""
