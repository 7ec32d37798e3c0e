"""How weights are rounded, and what is corrected after them."""
