"""What is observed of a tensor, and the range that is chosen for it."""
