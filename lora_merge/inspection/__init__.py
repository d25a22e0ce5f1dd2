"""Inspection of an adapter: its modules, the size of its changes, the engines that serve it, and pictures of these."""
