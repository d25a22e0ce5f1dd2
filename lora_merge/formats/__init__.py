"""File formats: safetensors, pickles, the manifest, the model card, side files."""
