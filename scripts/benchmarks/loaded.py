"""Run the command in a process that has torch loaded, as the second merge of a batch finds it."""

import torch  # noqa: F401

from lora_merge.cli import entry

entry()
