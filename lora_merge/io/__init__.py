"""Bytes: the only place that opens files."""
