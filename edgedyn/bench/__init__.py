"""How fast a bundle is here, whole and by layer."""
