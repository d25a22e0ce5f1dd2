"""``python -m lora_merge`` is the ``lora-merge`` command."""

from lora_merge.cli import main

if __name__ == "__main__":
    main(prog_name="lora-merge")
