"""Recipes: YAML files that describe a build, with the type, default and meaning of each key."""
