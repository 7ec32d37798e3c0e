"""Exact rewrites that bring channels to one size before they are quantized."""
