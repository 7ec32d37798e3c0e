"""Use of a bundle on the device: run it on images, check it. Standard library, numpy and the runtime."""
