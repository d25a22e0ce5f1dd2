"""What every adapter format keeps, for each member of `FORMATS`."""

from __future__ import annotations

import pytest

from lora_merge.adapters import FORMATS, read
from lora_merge.core.tensor import nbytes_of
from lora_merge.deltas import ALGEBRAS
from lora_merge.errors import UnknownFormatError
from tests.tampering import edit_tensors

every_format = pytest.mark.parametrize("name", FORMATS)


@pytest.fixture
def sample(pico, pico_adapter):
    """Return a function: name of a format → directory of an adapter in it."""
    makers = {"peft": lambda: pico_adapter(pico())}
    return lambda name: makers[name]()


@every_format
def test_a_format_knows_its_own(name, sample):
    adapter = FORMATS[name](sample(name))
    assert adapter.format == name
    assert adapter.issues == ()
    assert adapter.deltas
    assert read(sample(name)) == adapter


@every_format
def test_a_format_leaves_what_it_does_not_know_to_others(name, sample, tmp_path):
    assert FORMATS[name](tmp_path) is None
    (tmp_path / "adapter.txt").write_text("weights")
    assert FORMATS[name](tmp_path) is None
    with pytest.raises(UnknownFormatError, match=r"adapter\.txt"):
        read(tmp_path)


@every_format
def test_every_delta_names_an_algebra_and_tensors_that_are_in_the_file(name, sample):
    root = sample(name)
    adapter = FORMATS[name](root)
    parameters = [delta.parameter for delta in adapter.deltas]
    assert len(set(parameters)) == len(parameters)
    for delta in adapter.deltas:
        assert delta.kind in ALGEBRAS
        assert delta.scale > 0
        assert delta.rank > 0
        for ref in delta.tensors.values():
            assert ref.nbytes == nbytes_of(ref.dtype, ref.shape)
            assert ref.file.startswith(str(root))


@every_format
def test_the_digest_tells_two_adapters_apart(name, sample, tampered):
    root = tampered(sample(name))
    before = FORMATS[name](root).digest
    assert FORMATS[name](sample(name)).digest == before

    def negate_one(tensors):
        first = min(tensors)
        tensors[first] = -tensors[first]

    edit_tensors(next(root.glob("*.safetensors")), negate_one)
    assert FORMATS[name](root).digest != before
