"""Rounding: which of a grid's numbers each value of a merged weight becomes."""
