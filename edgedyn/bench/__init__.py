"""Benchmark of a bundle: the whole program, and each layer."""
