"""Training of the networks: the denoising loop, and the mask budget of DynConv."""
