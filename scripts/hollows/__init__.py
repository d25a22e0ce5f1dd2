"""Checkpoints with the shapes of published models: hollow ones, which take no disk, and slices of them, which are merged."""
