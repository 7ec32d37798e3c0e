"""Photos, noise and crops: every sample that a network is calibrated or validated on."""
