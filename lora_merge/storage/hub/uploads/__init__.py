"""Outputs on the Hugging Face Hub: filled in a pull request, and merged when they are complete and verified."""
