"""What every codec keeps that writes onto stored scales, for each member of `ENCODERS` but plain tensors."""

from __future__ import annotations

import pytest

from lora_merge.core.weight import WEIGHT
from lora_merge.formats.safetensors import load
from tests.decoding import decoded, raw, tiles_of, views_of
from tests.encoding import encoded
from tests.storages.reference import FIXTURES, NAMES, quantised_of


@pytest.mark.parametrize("name", NAMES)
def test_what_a_library_stored_is_encoded_as_it_was(name):
    for path, weight in quantised_of(FIXTURES / name).items():
        shape, storage = weight.shape, weight.storage
        stored = {role: load(ref) for role, ref in weight.parts.items()}
        values = decoded(shape, storage, stored)
        for view in views_of(shape):
            for size in (1, 1 << 12, 1 << 19):
                tiles = tiles_of(shape, storage, view, size)
                assert encoded(values, stored, storage, tiles) == raw(stored[WEIGHT]), (path, len(tiles))
