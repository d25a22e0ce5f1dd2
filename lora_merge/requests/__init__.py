"""What a user can ask for: the table of options, and all that follows from it.

`table.OPTIONS` says each option once. The options of the command (`cli/options.py`), the keys of YAML files, the checks of
Python's arguments, what a manifest records, `request.py`, `keywords.py` and ``docs/cli.md`` are made from it.
"""
