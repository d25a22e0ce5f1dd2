"""A serving engine, which stumbles over one thing."""

from __future__ import annotations

from lora_merge.serving import Engine, Ranks, Rule
from lora_merge.serving.rules import Families

SOURCE = "toyserve 1 (2026), toy.py, read"

TOYSERVE = Engine(
    name="Toyserve",
    version="1",
    ranks=Ranks(most=0, source=SOURCE),
    families=Families(key="model_type", served={"llama": ""}, source=SOURCE, is_complete=True),
    rules=(Rule("rslora", "wrong", "multiplies by α/r", SOURCE, ("bake-scale",)),),
)
