"""An adapter, described: its modules, how large its changes are, which engines serve it; in a picture, too."""
