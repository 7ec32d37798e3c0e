"""Measurements on images: the mixed-precision search, and the ablation of the method."""
