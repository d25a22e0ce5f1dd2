"""Verification of an existing output: against its manifest, its base and adapter, and forward passes."""
