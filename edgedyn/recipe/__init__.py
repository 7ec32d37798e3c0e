"""What a user writes in YAML, and what each key may be."""
