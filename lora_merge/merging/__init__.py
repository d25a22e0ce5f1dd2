"""A merge, from a request to a published output."""
