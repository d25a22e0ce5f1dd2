"""What transformers knows of a model: its modules without weights, and how stored tensors become parameters."""
