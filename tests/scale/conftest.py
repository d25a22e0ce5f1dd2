"""Hollow checkpoints are made by the scripts, which are no package."""

from __future__ import annotations

from tests.scripts.conftest import SCRIPTS

__all__ = ["SCRIPTS"]
