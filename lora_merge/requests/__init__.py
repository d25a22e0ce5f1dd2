"""Requests: the table of options, and everything made from it.

`table.OPTIONS` defines each option once. The command's options (`cli/options.py`), the keys of YAML files, the checks of
Python's arguments, the options in a manifest, `request.py`, `keywords.py` and ``docs/cli.md`` are made from it.
"""
