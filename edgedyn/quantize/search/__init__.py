"""Which layers stay float, and what each switch of the method is worth, as measured."""
