"""Digests of every output that a test suite makes: the bytes of two commits are compared by them."""
