"""How models call the parts that see and hear."""

from __future__ import annotations

import re

TOWER = re.compile(
    r"(^|\.)(visual|vision_tower|vision_model|vision_encoder|multi_modal_projector|audio_tower|embed_vision"
    r"|embed_audio|vision_embedder)(\.|$)"
)
"""Modules of a vision or audio tower, or of its connection to the language model."""
