"""A layout: the dots of a module's path are ``__`` in the names of a checkpoint."""

from __future__ import annotations

from lora_merge.layouts import Layout, Located, Place


def stored_name(parameter):
    module, _, last = parameter.rpartition(".")
    return f"{module.replace('.', '__')}.{last}"


def find(parameter, shape, stored):
    name = stored_name(parameter)
    if name not in stored.tensors:
        return None
    return Located("underscored", (Place(name),), stored.tensors[name].shape)


UNDERSCORED = Layout(find, "its path is stored with underscores for its dots")
