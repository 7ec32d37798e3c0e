"""From a recipe to the programs that a target lowers."""
