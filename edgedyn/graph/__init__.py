"""Exported graphs: read a node, change constants and types, rewrite exactly."""
