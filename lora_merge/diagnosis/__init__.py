"""Diagnosis: what this machine has of everything that a merge needs."""
