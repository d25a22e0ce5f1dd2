"""What rounding does to merged weights, measured: the parts of `scripts/rounding.py`."""
