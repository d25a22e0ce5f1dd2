"""Nouns: frozen dataclasses and pure functions. No file is opened here."""
