"""What a node of an exported graph is, and exact rewrites of it."""
