"""From a weights file, ours or the authors', to a loaded network."""
