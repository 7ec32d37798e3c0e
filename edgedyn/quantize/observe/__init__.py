"""Observation of a program's tensors on calibration samples, and the choice of their ranges."""
