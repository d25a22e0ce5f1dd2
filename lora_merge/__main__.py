"""``python -m lora_merge`` is the ``lora-merge`` command."""

from lora_merge.cli import entry

if __name__ == "__main__":
    entry()
