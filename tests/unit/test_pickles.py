"""Torch's zip files: every tensor is where torch finds it, nothing of the file is run, and every fault has its sentence."""

from __future__ import annotations

import os
import random
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch

from lora_merge.core.tensor import TORCH_TYPES
from lora_merge.errors import CheckpointError
from lora_merge.formats import pickles, unpickling
from lora_merge.formats.pickles import read_pickle
from lora_merge.formats.safetensors import blocks, load
from tests.tampering import edit_records

FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
DTYPES = [*TORCH_TYPES.values(), "uint16", "uint32", "uint64", *FLOAT8]
A = torch.arange(12.0).view(3, 4)


@pytest.fixture
def saved(tmp_path):
    """Return a function: an object → the file that torch saved it in."""

    def save(value, **options):
        torch.save(value, tmp_path / "pytorch_model.bin", **options)
        return tmp_path / "pytorch_model.bin"

    return save


def refused(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_pickle(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert caught.value.hint
    return caught.value


def stored_bytes(ref) -> bytes:
    return b"".join(map(bytes, blocks(ref)))


def bytes_of(tensor) -> bytes:
    return (
        tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_of_any_plain_dtype_has_the_bytes_that_torch_reads(dtype, saved):
    path = saved({"first": torch.ones(5), "weight": A.to(getattr(torch, dtype)), "last": torch.ones(3)})

    refs = {ref.name: ref for ref in read_pickle(path).tensors}

    wanted = torch.load(path, weights_only=True)["weight"]
    assert refs["weight"].shape == (3, 4)
    assert refs["weight"].nbytes == 12 * wanted.element_size()
    assert stored_bytes(refs["weight"]) == bytes_of(wanted)
    if dtype in TORCH_TYPES.values():
        assert load(refs["weight"]).dtype == wanted.dtype


def test_views_parameters_scalars_and_empty_tensors_have_the_bytes_that_torch_reads(saved):
    noted = torch.nn.Parameter(torch.randn(4))
    noted.origin = "a parameter may have attributes"
    bare = torch.randn(5)
    bare.origin = "and so may a tensor"
    path = saved(
        {
            "whole": A,
            "rows": A[1:],
            "middle": A.view(-1)[5:9].view(2, 2),
            "column": A[:, :1][:1],
            "parameter": torch.nn.Parameter(torch.randn(2, 3).half()),
            "noted": noted,
            "bare": bare,
            "scalar": torch.tensor(2.5).bfloat16(),
            "empty": torch.zeros(0, 4).t(),
        }
    )

    refs = {ref.name: ref for ref in read_pickle(path).tensors}

    for name, tensor in torch.load(path, weights_only=True).items():
        assert refs[name].shape == tuple(tensor.shape)
        assert stored_bytes(refs[name]) == bytes_of(tensor), name


def test_a_module_s_state_dict_is_read_whatever_else_it_notes(saved):
    state = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).state_dict()
    assert state._metadata

    assert {ref.name for ref in read_pickle(saved(state)).tensors} == set(state)


@pytest.mark.parametrize("protocol", [2, 3])
def test_both_protocols_that_torch_reads_are_read(protocol, saved):
    (ref,) = read_pickle(saved({"a": A}, pickle_protocol=protocol)).tensors
    assert torch.equal(load(ref), A)


def test_two_names_of_one_storage_are_two_names_of_the_same_bytes(saved):
    one, other = read_pickle(saved({"embed_tokens.weight": A, "lm_head.weight": A})).tensors
    assert (one.name, other.name) == ("embed_tokens.weight", "lm_head.weight")
    assert (one.start, one.nbytes) == (other.start, other.nbytes)


def test_the_tensors_come_in_the_order_of_their_bytes_and_under_the_name_that_is_asked_for(saved):
    path = saved({"b": torch.ones(2), "a": torch.ones(3), "c": torch.ones(4)})
    file = read_pickle(path, "model.safetensors")
    assert file.name == "model.safetensors"
    assert [ref.start for ref in file.tensors] == sorted(ref.start for ref in file.tensors)
    assert {ref.file for ref in file.tensors} == {str(path)}


@pytest.mark.skipif(
    not hasattr(torch.serialization, "skip_data"), reason="torch < 2.6 writes no sparse files"
)
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="bytes read are counted by Linux")
def test_an_index_of_gigabytes_reads_no_weights(saved):
    tensors = {f"layers.{n}.weight": torch.empty(4, 4) for n in range(1000)}
    tensors |= {"large": torch.empty(5 << 28), "behind": torch.empty(3, 5)}
    with torch.serialization.skip_data():
        path = saved(tensors)
    assert path.stat().st_size > 5 << 30
    before = n_bytes_read()
    tracemalloc.start()

    refs = {ref.name: ref for ref in read_pickle(path).tensors}

    assert n_bytes_read() - before < 1 << 20
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    assert refs["behind"].start > refs["large"].end - 1 > 5 << 30
    with path.open("r+b") as stream:
        stream.seek(refs["behind"].start)
        stream.write(torch.arange(15.0).numpy().tobytes())
    found = torch.load(path, weights_only=True, mmap=True)["behind"]
    assert torch.equal(found, torch.arange(15.0).view(3, 5))


def n_bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


class Hostile:
    """Runs a function when it is loaded by whoever trusts it."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HOSTILE = {
    "posix.system": (os.system, "touch {}"),
    "__builtin__.eval": (eval, "open('{}', 'w')"),
    "__builtin__.getattr": (getattr, {}, "clear"),
    "torch.storage._load_from_bytes": (torch.storage._load_from_bytes, b"{}"),
    "torch.serialization.load": (torch.load, "{}"),
}


@pytest.mark.parametrize("named", HOSTILE)
@pytest.mark.parametrize(
    "wrap", [lambda evil: {"a": A, "b": evil}, lambda evil: evil, lambda evil: {evil: A}]
)
def test_a_hostile_pickle_runs_nothing_and_is_told_what_it_wanted(named, wrap, saved, tmp_path):
    function, *arguments = HOSTILE[named]
    mark = tmp_path / "mark"
    evil = Hostile(function, *(x.format(mark) if isinstance(x, str) else x for x in arguments))

    error = refused(saved(wrap(evil)))

    assert f"would import {named}, expected only plain tensors" in str(error)
    assert "only if you trust" in error.hint
    assert not mark.exists()


def test_what_a_pickle_does_to_its_stand_ins_is_forgotten(saved):
    """BUILD sets attributes of what was named last; on a function of ours it would last beyond the file."""
    path = saved({"a": A})
    build = b"ctorch._utils\n_rebuild_tensor_v2\n}(X\x04\x00\x00\x00pathX\x01\x00\x00\x00yX\x03\x00\x00\x00newK\x01ub0"

    edit_records(
        path, lambda records: records.update({"data.pkl": records["data.pkl"].replace(b"}", build + b"}", 1)})
    )
    (ref,) = read_pickle(path).tensors
    assert torch.equal(load(ref), A)

    changed = b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_parameter\n%s\x85R}X\x05\x00\x00\x00shapeK\x01sbs."
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x0ctQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(%sK\x00K\x03K\x04\x86K\x04K\x01\x86\x89}tR" % storage
    edit_records(path, lambda records: records.update({"data.pkl": changed % tensor}))
    assert "data.pkl: is a malformed pickle" in str(refused(path))


class Subclass(torch.Tensor):
    """A tensor that is more than its values."""


VALUES = {
    "w: has the strides [1, 4] for the shape [4, 3], expected contiguous values in row-major order": A.t,
    "w: has the strides [8, 2]": lambda: torch.zeros(3, 8)[:, ::2],
    "w: has the strides [0, 1]": lambda: torch.zeros(1, 4).expand(3, 4),
    "w: is marked as negated or conjugated": lambda: torch.randn(3, dtype=torch.complex64).conj().imag,
    "w: is stored as torch.ComplexFloatStorage, expected a real, plain dtype": lambda: A.to(torch.complex64),
    "w: is stored as torch.ComplexDoubleStorage": lambda: A.to(torch.complex128),
    "w: is made by torch._utils._rebuild_qtensor": lambda: torch.quantize_per_tensor(A, 0.1, 0, torch.qint8),
    "w: is made by torch._utils._rebuild_sparse_tensor": A.to_sparse,
    "w: is made by torch._utils._rebuild_meta_tensor_no_storage": lambda: torch.empty(3, device="meta"),
    "w: is made by torch._utils._rebuild_nested_tensor": lambda: torch.nested.nested_tensor([A, A]),
    f"would import {Subclass.__module__}.Subclass": lambda: A.as_subclass(Subclass),
    "w: is made by torch.float32, expected a plain tensor": lambda: torch.float32,
    "w: is a bare storage, expected a plain tensor": lambda: torch.ones(3).untyped_storage(),
    "w: is a value of type int": lambda: 3,
    "w: is a value of type NoneType": lambda: None,
    "w: is a table, expected a tensor": lambda: {"a": A},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("words", VALUES)
def test_what_is_no_plain_tensor_is_named(words, saved):
    assert words in str(refused(saved({"a": A, "w": VALUES[words]()})))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([A], "contains a value of type list, expected a table of tensors by their names"),
        (A, "contains a tensor, expected a table"),
        ({3: A}, "has a value of type int as a name"),
        ({"state_dict": {"a": A}}, "state_dict: is a table, expected a tensor"),
        ({"model": {"a": A}, "epoch": 3}, "model: is a table, expected a tensor"),
        (torch.nn.Linear(2, 2), "would import torch.nn.modules.linear.Linear"),
    ],
)
def test_a_file_that_is_no_table_of_tensors_is_named(value, words, saved):
    assert words in str(refused(saved(value)))


def test_the_hint_for_a_wrapped_state_dict_names_the_wrapper(saved):
    assert "save only the content of 'state_dict'" in refused(saved({"state_dict": {"a": A}})).hint


def compressed(path):
    edit_records(path, lambda records: None, zipfile.ZIP_DEFLATED)
    return "its record byteorder is compressed or encrypted, expected plain bytes"


def big_endian(path):
    edit_records(path, lambda records: records.update(byteorder=b"big"))
    return "byteorder: is big-endian, expected little-endian"


def storage_lost(path):
    edit_records(path, lambda records: records.pop("data/0"))
    return "a: its record data/0 is not in the file"


def storage_too_small(path):
    edit_records(path, lambda records: records.update({"data/0": b"short"}))
    return "a: needs bytes 0 to 48 of a storage of 5 bytes, expected a range inside the storage"


def no_pickle(path):
    edit_records(path, lambda records: records.pop("data.pkl"))
    return "has 0 records named data.pkl, expected one"


def two_pickles(path):
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", b"")
    return "has 2 records named data.pkl, expected one"


@pytest.mark.filterwarnings("ignore:Duplicate name")
def a_record_twice(path):
    edit_records(path, lambda records: None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", b"another")
    return "has two records with the same name"


def torchscript(path):
    path.unlink()
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    return "is a TorchScript archive, expected a file of torch.save"


def legacy(path):
    torch.save({"a": A}, path, _use_new_zipfile_serialization=False)
    return "is in the format of torch before 1.6, expected the zip format"


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-100])
    return "has no complete zip directory at its end"


def a_pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    return "is a Git LFS pointer: the file itself was not downloaded"


def nothing_in_it(path):
    path.write_bytes(b"")
    return "is empty (0 bytes)"


def moved(path):
    """Let the directory at the end of the zip point elsewhere for the storage."""
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"/data/0") - 46  # the entry's fixed part ends with the offset, before the name
    at = raw.rindex(b"PK\x01\x02", 0, at + 46)
    raw[at + 42 : at + 46] = (7).to_bytes(4, "little")
    path.write_bytes(raw)
    return "a: its record data/0 is outside the file"


def pickle_cut_off(path):
    edit_records(path, lambda records: records.update({"data.pkl": records["data.pkl"][:-20]}))
    return "data.pkl: is a malformed pickle"


def negative_offset(path):
    edit_records(
        path,
        lambda records: records.update(
            {"data.pkl": records["data.pkl"].replace(b"QK\x00K", b"QJ\xfc\xff\xff\xffK")}
        ),
    )
    return "a tensor has invalid sizes"


def another_protocol(path):
    torch.save({"a": A}, path, pickle_protocol=4)
    return "data.pkl: has pickle protocol 4, expected 2 or 3"


def a_memo_of_gigabytes(path):
    text = b"\x80\x02}r\xff\xff\xff\x7f."
    edit_records(path, lambda records: records.update({"data.pkl": text}))
    return "is a malformed pickle (object number 2147483647 in only 9 bytes)"


FAULTS = [
    compressed, big_endian, storage_lost, storage_too_small, no_pickle, two_pickles, a_record_twice, torchscript,
    legacy, cut_off, a_pointer, nothing_in_it, moved, pickle_cut_off, negative_offset, another_protocol,
    a_memo_of_gigabytes,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_file_is_named(fault, saved):
    path = saved({"a": A})
    words = fault(path)
    assert words in str(refused(path))


def test_a_pickle_of_values_is_refused_before_it_is_read(saved, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_PICKLE_BYTES", 40)
    assert "data.pkl: has" in str(refused(saved({"a": A})))


def test_a_file_without_a_mark_of_its_byte_order_is_little_endian(saved):
    path = saved({"a": A})
    edit_records(path, lambda records: records.pop("byteorder"))
    assert torch.equal(load(read_pickle(path).tensors[0]), A)


def test_no_damage_to_a_pickle_raises_anything_but_a_sentence(saved):
    path = saved({"a": A, "b": torch.nn.Parameter(A.half()), "c": A.to(torch.uint16)})
    with zipfile.ZipFile(path) as archive:
        whole = archive.read("pytorch_model/data.pkl")
    chance, refusals = random.Random(3), 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(2, len(damaged))] = chance.randrange(256)
        edit_records(path, lambda records, text=bytes(damaged): records.update({"data.pkl": text}))
        try:
            refs = read_pickle(path).tensors
        except CheckpointError:
            refusals += 1
        else:
            assert all(0 < ref.start <= ref.end <= path.stat().st_size for ref in refs)
    assert 50 < refusals < 400


def test_the_file_is_read_without_torch(saved):
    import subprocess
    import sys

    program = (
        "import sys; from pathlib import Path; from lora_merge.formats.pickles import read_pickle;"
        "print(len(read_pickle(Path(sys.argv[1])).tensors), 'torch' in sys.modules)"
    )
    path = saved({"a": A, "b": A + 1})
    result = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["2", "False"]


def test_only_the_table_of_makers_is_ever_called():
    """What a pickle may name and have called: nothing of it is torch's, or Python's."""
    for maker in unpickling.MAKERS.values():
        assert maker.__module__ == "lora_merge.formats.unpickling"


def pickled(path: Path, content: bytes) -> Path:
    """Write a file of torch with a pickle of our choice."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + content)
    return path


def shared(depth: int) -> bytes:
    """Return opcodes of a tuple that holds the one before it twice, and so on: two to the power of `depth` leaves."""
    twice = b"".join(b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(depth))
    return b")q\x00" + twice


NESTED = b")" + b"\x85" * 1_000_000
PAIR = b"X\x01\x00\x00\x00aK\x01"
BOMBS = {
    "a shared tuple as a key": (b"}(" + shared(60) + b"K\x01u.", "has a value of type tuple as a name"),
    "one key": (b"}" + shared(60) + b"K\x01s.", "has a value of type tuple as a name"),
    "a nested tuple as a key": (b"}(" + NESTED + b"K\x01u.", "has a value of type tuple as a name"),
    "a nested tuple as a value": (b"}X\x01\x00\x00\x00a" + NESTED + b"s.", "a: is a value of type tuple"),
    "a nested list": (
        b"}X\x01\x00\x00\x00a" + b"]" * 500_000 + b"a" * 499_999 + b"s.",
        "a: is a value of type list",
    ),
    "a shared tuple as all there is": (shared(60) + b".", "contains a value of type tuple"),
    "a shared tuple as a storage": (shared(60) + b"Q.", "an invalid reference to a storage"),
    "a key of the attributes": (
        b"ccollections\nOrderedDict\n)R}(" + shared(60) + b"K\x01ub.",
        "tuple as a name",
    ),
    "pairs of an old table": (
        b"ccollections\nOrderedDict\n](" + shared(60) + b"K\x01\x86e\x85R.",
        "tuple as a name",
    ),
    "a shared tuple to a maker": (b"ctorch._utils\n_rebuild_tensor_v2\n" + shared(60) + b"R.", "malformed"),
    "a tensor of a million dimensions": (
        b"](" + b"K\x01" * 1_000_000 + b"eq\x000ctorch._utils\n_rebuild_tensor_v2\n(NK\x00h\x00h\x00tR.",
        "malformed",
    ),
    "makers in makers": (
        b"ctorch._tensor\n_rebuild_from_type_v2\nq\x00(h\x00ctorch\nTensor\n(h\x00ctorch\nTensor\n)Nt}tR.",
        "a tensor is made by an unknown function",
    ),
    "what torch would make beside the tensors": (
        b"ccollections\nOrderedDict\n)R}X\x01\x00\x00\x00actorch._utils\n_rebuild_qtensor\n)Rsb.",
        "would call torch._utils._rebuild_qtensor",
    ),
    "marks without end": (b"(" * 3_000_000 + b".", "malformed"),
    "nothing on the stack": (b"\x86.", "malformed"),
    "a name without an end": (b"c" + b"a" * 1_000_000, "malformed"),
    "numbers that collide": (
        b"}("
        + b"".join(b"\x8a\x10" + ((2**61 - 1) * n).to_bytes(16, "little") + b"N" for n in range(1, 9))
        + b"u.",
        "has a value of type int as a name",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_that_would_keep_python_s_unpickler_busy_or_end_it_is_refused(bomb, tmp_path):
    content, words = BOMBS[bomb]
    began = time.process_time()
    assert words in str(refused(pickled(tmp_path / "adapter_model.bin", content)))
    assert time.process_time() - began < 30


def test_a_pickle_of_more_steps_than_are_meant_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(unpickling, "MAX_STEPS", 1000)
    path = pickled(tmp_path / "adapter_model.bin", b"}" + b"N" * 2000 + b".")
    assert "more than 1000 steps" in str(refused(path))
    pairs = b"](" + (PAIR + b"\x86") * 90 + b"eq\x00" + b"ccollections\nOrderedDict\nh\x00\x85R" * 9
    assert "more than 1000 steps" in str(refused(pickled(path, pairs + b".")))


def test_a_zip_that_claims_a_directory_of_gigabytes_is_refused_before_it_is_read(saved):
    path = saved({"a": A})
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"PK\x05\x06")
    raw[at + 12 : at + 16] = (0xFFFFFFF0).to_bytes(4, "little")
    path.write_bytes(raw)
    with path.open("r+b") as stream:  # a hole: 5 GB of it take no room on the disk
        end = raw[at:]
        stream.truncate(5 << 30)
        stream.seek(0, 2)
        stream.write(end)
    tracemalloc.start()

    assert "has no complete zip directory" in str(refused(path))

    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_a_table_of_pairs_is_read_as_python_2_wrote_it(saved):
    path = saved({"a": A})
    storage = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x0ctQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(%sK\x00K\x03K\x04\x86K\x04K\x01\x86\x89}tR" % storage
    content = b"\x80\x02ccollections\nOrderedDict\n]](U\x01a%sea\x85R." % tensor
    edit_records(path, lambda records: records.update({"data.pkl": content}))

    (ref,) = read_pickle(path).tensors

    assert ref.name == "a"
    assert torch.equal(load(ref), A)
    assert list(torch.load(path, weights_only=True)) == ["a"]
