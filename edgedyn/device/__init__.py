"""Use a bundle where it stands."""
