"""An existing output: held to its manifest, to base and adapter, and to forward passes."""
