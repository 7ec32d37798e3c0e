"""The calibration table: a text file, and its entries."""
