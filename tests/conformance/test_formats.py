"""What every adapter format keeps, for each member of `FORMATS`."""

from __future__ import annotations

import shutil

import pytest

from lora_merge.adapters import FORMATS, read
from lora_merge.core.tensor import nbytes_of
from lora_merge.deltas import ALGEBRAS
from lora_merge.errors import ResolveError, UnknownFormatError
from tests import twins
from tests.tampering import edit_json, edit_tensors

every_format = pytest.mark.parametrize("name", FORMATS)


@pytest.fixture
def sample(pico, pico_adapter, tmp_path_factory):
    """Return a function: name of a format → directory of an adapter in it, the same one each time."""
    made = {"peft": pico_adapter(pico())}
    makers = {"ms-swift": twins.swift, "mlx": twins.mlx}

    def make(name):
        if name not in made:
            made[name] = makers[name](made["peft"], tmp_path_factory.mktemp(name))
        return made[name]

    return make


@every_format
def test_a_format_knows_its_own(name, sample):
    adapter = FORMATS[name].read(sample(name), ())
    assert adapter.format == name
    assert adapter.issues == ()
    assert adapter.deltas
    assert read(sample(name)) == adapter


@every_format
def test_a_format_leaves_what_it_does_not_know_to_others(name, sample, tmp_path):
    assert FORMATS[name].read(tmp_path, ()) is None
    (tmp_path / "adapter.txt").write_text("weights")
    assert FORMATS[name].read(tmp_path, ()) is None
    with pytest.raises(UnknownFormatError, match=r"adapter\.txt") as caught:
        read(tmp_path)
    assert FORMATS[name].looked_for in str(caught.value)


@every_format
def test_no_two_formats_claim_one_directory(name, sample):
    assert [other for other, one in FORMATS.items() if one.read(sample(name), ()) is not None] == [name]


@every_format
def test_the_configuration_decides_which_format_is_read_and_weights_of_another_are_an_error(
    name, sample, tampered
):
    root = tampered(sample(name))
    for other in sorted({one.weights for one in FORMATS.values()} - {FORMATS[name].weights}):
        (root / other).write_bytes((root / FORMATS[name].weights).read_bytes())
        adapter = read(root)
        assert adapter.format == name
        assert [(issue.severity, issue.code, issue.subject) for issue in adapter.issues] == [
            ("error", "unread-file", other)
        ]
        left_out = read(root, frozenset({other}))
        assert [(issue.severity, issue.subject) for issue in left_out.issues] == [("note", other)]


@every_format
def test_an_adapter_is_found_in_the_only_subfolder_that_holds_one(name, sample, tmp_path):
    root = tmp_path / "output"
    shutil.copytree(sample(name), root / "mine")
    (root / "logs").mkdir()
    (root / "tokenizer.json").write_text("{}")
    adapter = read(root)
    alone = FORMATS[name].read(root / "mine", ())
    assert adapter.deltas == alone.deltas
    assert adapter.root == str(root / "mine")
    assert [file.name for file in adapter.side_files] == ["tokenizer.json"]
    assert [str(issue) for issue in adapter.issues] == [
        f"{root}: has no adapter at its top level; the one in its subfolder mine was used"
    ]


@every_format
def test_several_subfolders_with_an_adapter_are_listed(name, sample, tmp_path):
    for folder in ("two", "one"):
        shutil.copytree(sample(name), tmp_path / folder)
    with pytest.raises(ResolveError, match=r"contains 2 adapters \(one, two\), expected one") as caught:
        read(tmp_path)
    assert caught.value.hint == f"pass the folder of one of them: {tmp_path / 'one'}"


def test_a_subfolder_whose_files_are_no_adapter_is_named(tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "adapter_config.json").write_text("{}")
    with pytest.raises(
        UnknownFormatError, match=r"half: has adapter_config\.json and no weights: adapter_model.safetensors"
    ):
        read(tmp_path)


def test_a_broken_adapter_is_not_replaced_by_one_in_a_subfolder(sample, tampered, tmp_path):
    root = tampered(sample("peft"))
    shutil.copytree(sample("peft"), root / "checkpoint-10")
    (root / "adapter_model.safetensors").unlink()
    with pytest.raises(UnknownFormatError, match=r"tampered: has adapter_config\.json and no weights"):
        read(root)


def test_a_config_without_a_type_is_pefts_unless_it_has_the_fields_of_another(sample, tampered):
    root = tampered(sample("peft"))
    edit_json(root / "adapter_config.json", peft_type=...)
    assert FORMATS["peft"].read(root, ()).format == "peft"
    edit_json(root / "adapter_config.json", lora_parameters={"rank": 4})
    assert FORMATS["peft"].read(root, ()) is None


@every_format
def test_every_delta_names_an_algebra_and_tensors_that_are_in_the_file(name, sample):
    root = sample(name)
    adapter = FORMATS[name].read(root, ())
    parameters = [delta.parameter for delta in adapter.deltas]
    assert len(set(parameters)) == len(parameters)
    for delta in adapter.deltas:
        assert ALGEBRAS[delta.algebra].facts is type(delta.facts)
        assert delta.scale > 0
        assert delta.rank > 0
        for ref in delta.factors.values():
            assert ref.nbytes == nbytes_of(ref.dtype, ref.shape)
            assert ref.file.startswith(str(root))


@every_format
def test_the_digest_tells_two_adapters_apart(name, sample, tampered):
    root = tampered(sample(name))
    before = FORMATS[name].read(root, ()).digest
    assert FORMATS[name].read(sample(name), ()).digest == before

    def negate_one(tensors):
        first = min(tensors)
        tensors[first] = -tensors[first]

    edit_tensors(root / FORMATS[name].weights, negate_one)
    assert FORMATS[name].read(root, ()).digest != before
