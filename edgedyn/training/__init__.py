"""What each paper needs to be trained: the denoising loop."""
