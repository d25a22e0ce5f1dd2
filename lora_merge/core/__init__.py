"""Nouns that several rooms share: frozen dataclasses and pure functions. No file is opened here."""
