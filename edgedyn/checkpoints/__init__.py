"""From a file of weights, ours or the authors', to a loaded network."""
