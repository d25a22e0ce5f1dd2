"""The one list of faults and of hostile inputs: what the tests do, what ``docs/security.md`` says.

A row breaks something in its own way, and names the words that the one sentence must have and the exit code. ``{base}``,
``{adapter}`` and ``{out}`` stand for the paths.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_merge.cli import exits
from tests.tampering import edit_json, edit_tensors, to_pickles

INDEX, ADAPTER = "model.safetensors.index.json", "adapter_model.safetensors"
NOBODY = 65534


@dataclass
class Place:
    """Where a merge is to fail: copies of a base in two shards and of an adapter, which may be broken, and an output."""

    root: Path
    base: Path
    adapter: Path
    out: Path
    options: list[str] = field(default_factory=list)
    during: Callable[[], None] | None = None
    """Called once, when the first tensor is done."""

    appeared: dict[str, str] | None = None
    """What somebody else has put under the output's name meanwhile: file → digest."""

    resume: Callable[[], None] = lambda: None
    """Resumes the merge; for a cause that ends before its context does."""

    def shard(self) -> Path:
        """Return the base's last weight file."""
        return max(self.base.glob("*.safetensors"))

    @contextlib.contextmanager
    def disk(self, nbytes: int) -> Iterator[Path]:
        """Mount a small real filesystem for the output."""
        disk = self.root / "disk"
        disk.mkdir()
        self.out = disk / "out"
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", disk], check=True)
        try:
            yield disk
        finally:
            subprocess.run(["umount", disk], check=True)


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    name: str
    says: str
    code: int
    cause: Callable[[Place], contextlib.AbstractContextManager[None] | None]
    """Breaks it, at once or while a context is open."""

    is_resumed: bool = False
    """True where the same merge goes on with ``--resume`` once the cause is gone."""

    needs: str = ""
    """``root``: to mount a filesystem; ``nobody``: to become somebody who may do less."""


# ------------------------------------------------------------------------------------------- the machine


@contextlib.contextmanager
def _full_at_once(place: Place) -> Iterator[None]:
    with place.disk(64 << 10):
        yield


@contextlib.contextmanager
def _full_at_the_end(place: Place) -> Iterator[None]:
    """Leave room for the weights, and not for what goes around them."""
    with place.disk(64 << 20) as disk:

        def fill() -> None:
            free = shutil.disk_usage(disk).free
            with (disk / "others").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, free - free % 4096)

        place.during = fill
        yield
        (disk / "others").unlink()
        place.resume()


@contextlib.contextmanager
def _read_only(place: Place) -> Iterator[None]:
    with place.disk(64 << 20) as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        yield


def _locked_directory(place: Place) -> None:
    place.out = place.root / "locked" / "out"
    place.out.parent.mkdir(mode=0o555)


def _locked_file(place: Place) -> None:
    place.shard().chmod(0)


@contextlib.contextmanager
def _failing(
    name: str, code: int, after: int, *, when: Callable[..., bool] = lambda *_: True
) -> Iterator[None]:
    """Have a call to the kernel fail from some time on, as a disk that dies would."""
    real, n_calls = getattr(os, name), 0

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal n_calls
        n_calls += when(*arguments)
        if n_calls > after and when(*arguments):
            raise OSError(code, os.strerror(code))
        return real(*arguments, **named)

    setattr(os, name, call)
    try:
        yield
    finally:
        setattr(os, name, real)


@contextlib.contextmanager
def _dying_source(place: Place) -> Iterator[None]:
    """Let the first tensor be, and nothing of the base be read after it."""
    with contextlib.ExitStack() as stack:
        inodes = {path.stat().st_ino for path in place.base.glob("*.safetensors")}

        def die() -> None:
            stack.enter_context(
                _failing("preadv", errno.EIO, 0, when=lambda fd, *_: os.fstat(fd).st_ino in inodes)
            )

        place.during = die
        yield


def _dying_disk(place: Place) -> contextlib.AbstractContextManager[None]:
    return _failing("pwritev", errno.EIO, 6)


def _dying_flush(place: Place) -> contextlib.AbstractContextManager[None]:
    return _failing("fsync", errno.EIO, 0)


def _truncated(place: Place) -> None:
    os.truncate(place.shard(), place.shard().stat().st_size - 10)


def _grown(place: Place) -> None:
    with place.shard().open("ab") as file:
        file.write(b"more")


def _truncated_while_read(place: Place) -> None:
    place.during = lambda: os.truncate(place.shard(), 3000)


def _grown_while_read(place: Place) -> None:
    place.during = lambda: _grown(place)


def _replaced(path: Path) -> None:
    """Put another file of the same size and the same time of modification in the place of one."""
    new, time = path.with_name("new"), path.stat().st_mtime_ns
    content = path.read_bytes()
    new.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(new, ns=(time, time))
    new.replace(path)


def _shard_replaced_while_read(place: Place) -> None:
    place.during = lambda: _replaced(place.shard())


def _adapter_replaced_while_read(place: Place) -> None:
    place.during = lambda: _replaced(place.adapter / ADAPTER)


def _config_replaced_while_read(place: Place) -> None:
    place.during = lambda: _replaced(place.base / "config.json")


def _removed_while_read(place: Place) -> None:
    place.during = (place.adapter / ADAPTER).unlink


def _staging_removed(place: Place) -> None:
    place.during = lambda: shutil.rmtree(f"{place.out}.lora-merge-staging")


class _Takers:
    """Threads that take all memory when they are told, and hold it until it is over.

    What threads of earlier tests have freed stays with the arenas of the C library, which new threads take over. So there
    are as many as it makes, or the merge would find memory there.
    """

    def __init__(self) -> None:
        self._is_starved, self._is_over = threading.Event(), threading.Event()
        self._taken: list[bytearray] = []
        self._full = [0] * (8 * (os.cpu_count() or 1) + 1)
        self._threads = [
            threading.Thread(target=self._wait_and_take, args=(n,), daemon=True)
            for n in range(len(self._full))
        ]
        for one in self._threads:
            one.start()

    def take(self) -> None:
        """Take what is left, here and in all threads."""
        self._is_starved.set()
        self._take()
        while not all(self._full):
            time.sleep(0.01)

    def end(self) -> None:
        """Give everything back."""
        self._is_over.set()
        self._is_starved.set()
        for one in self._threads:
            one.join(timeout=10)
        self._taken.clear()

    def _take(self) -> None:
        with contextlib.suppress(MemoryError):
            while True:
                self._taken.append(bytearray(1 << 18))

    def _wait_and_take(self, n: int) -> None:
        self._is_starved.wait()
        if not self._is_over.is_set():
            self._take()
        self._full[n] = 1
        self._is_over.wait()  # its stack would be memory for the merge


@contextlib.contextmanager
def _no_memory(place: Place) -> Iterator[None]:
    """Take away the memory that the process has not used yet, and what it has for large blocks."""
    _widen(place)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    takers = _Takers()

    def starve() -> None:
        # Python hangs in `Thread.start` where a new thread has no memory for its own first steps (3.11).
        steps = bytearray(1 << 19)
        used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (used + (1 << 16), before[1]))
        takers.take()
        del steps

    place.during = starve
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
        takers.end()


def _widen(place: Place) -> None:
    """Replace base and adapter by larger ones, whose tiles have megabytes."""
    import transformers
    from peft import LoraConfig, get_peft_model

    config = transformers.LlamaConfig(
        hidden_size=768, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4, vocab_size=96
    )
    model = transformers.LlamaForCausalLM(config)
    for root in (place.base, place.adapter):
        shutil.rmtree(root)
    model.save_pretrained(place.base)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(place.adapter)


@contextlib.contextmanager
def _second_run(place: Place) -> Iterator[None]:
    from lora_merge.storage.journal import Journal
    from lora_merge.storage.staging import staging

    with staging(place.out) as stage, Journal(stage.home, "another merge"):
        yield


def _output_exists(place: Place) -> None:
    _output_is_no_model(place)
    (place.out / "config.json").write_text("{}")


@contextlib.contextmanager
def _output_appears(place: Place) -> Iterator[None]:
    from tests.faults.trial import content

    def appear() -> None:
        _output_is_no_model(place)
        place.appeared = content(place.out)

    place.during = appear
    yield
    place.appeared = None
    shutil.rmtree(place.out)


def _staging_of_somebody_else(place: Place) -> None:
    staging = Path(f"{place.out}.lora-merge-staging")
    staging.mkdir()
    os.chown(staging, NOBODY, NOBODY)


def _staging_for_all(place: Place) -> None:
    Path(f"{place.out}.lora-merge-staging").mkdir()
    Path(f"{place.out}.lora-merge-staging").chmod(0o777)


def _staging_is_a_link(place: Place) -> None:
    (place.root / "elsewhere").mkdir()
    (place.root / "elsewhere" / "thesis.txt").write_text("the only copy")
    Path(f"{place.out}.lora-merge-staging").symlink_to(place.root / "elsewhere")


def _staging_is_an_input(place: Place) -> None:
    place.base = place.base.rename(f"{place.out}.lora-merge-staging")


def _output_is_no_model(place: Place) -> None:
    place.out.mkdir()
    (place.out / "thesis.txt").write_text("the only copy")


def _output_is_inside_an_input(place: Place) -> None:
    place.out = place.adapter / "merged"


def _output_is_inside_the_base(place: Place) -> None:
    (place.root / "link").symlink_to(place.base)
    place.out = place.root / "link" / "merged"


def _output_is_an_input(place: Place) -> None:
    place.out = place.base
    place.options.append("--overwrite")


def _merged_before(place: Place) -> None:
    from lora_merge import merge

    merged = place.root / "merged"
    merge(base=place.base, adapter=place.adapter, out=merged)
    place.base = merged


FAULTS = (
    Fault("the disk has no room for the output", "{out}: needs ", exits.WRITE, _full_at_once, needs="root"),
    Fault("the disk is full before the last file", "no space left on the disk", exits.WRITE, _full_at_the_end, True, "root"),
    Fault("the output is on a disk that is read-only", "{out}: cannot be written (Read-only file system)", exits.WRITE, _read_only, needs="root"),
    Fault("the user may not write beside the output", "{out}: cannot be written (Permission denied)", exits.WRITE, _locked_directory, needs="nobody"),
    Fault("a weight file may not be read", ": cannot be opened (Permission denied)", exits.RESOLVE, _locked_file, needs="nobody"),
    Fault("the disk cannot read the base any more", ": cannot be read (Input/output error)", exits.RESOLVE, _dying_source, True),
    Fault("the disk cannot write any more", ": cannot be written (Input/output error)", exits.WRITE, _dying_disk, True),
    Fault("the disk does not keep what was written", ": cannot be written (Input/output error)", exits.WRITE, _dying_flush, True),
    Fault("a weight file is truncated", " bytes, expected ", exits.RESOLVE, _truncated),
    Fault("a weight file is longer than its header says", "it is truncated, or was extended", exits.RESOLVE, _grown),
    Fault("a weight file is truncated while it is read", ": changed while it was read", exits.RESOLVE, _truncated_while_read),
    Fault("a weight file grows while it is read", ": changed while it was read", exits.RESOLVE, _grown_while_read),
    Fault("a weight file is replaced by one of its size and time while it is read", ": changed while it was read", exits.RESOLVE, _shard_replaced_while_read),
    Fault("the adapter is replaced by one of its size and time while it is read", "{adapter}/adapter_model.safetensors: changed while it was read", exits.RESOLVE, _adapter_replaced_while_read),
    Fault("config.json is replaced by one of its size and time while it is read", "{base}/config.json: changed while it was read", exits.RESOLVE, _config_replaced_while_read),
    Fault("the adapter goes away while it is read", "{adapter}/adapter_model.safetensors: disappeared while it was read", exits.RESOLVE, _removed_while_read),
    Fault("another process removes the files that are being written", ": cannot be ", exits.WRITE, _staging_removed),
    Fault("memory runs out", " has no memory left", exits.WRITE, _no_memory, True),
    Fault("another run writes the same output", "another run is writing this output (process ", exits.WRITE, _second_run),
    Fault("the output exists", "{out}: already exists", exits.WRITE, _output_exists),
    Fault("the output exists and is not a model", "{out}: already exists and is not a model checkpoint", exits.WRITE, _output_is_no_model),
    Fault("something gets the output's name during the run", "{out}: already exists: another program created or changed it", exits.WRITE, _output_appears, True),
    Fault("another user has made the staging directory", "{out}.lora-merge-staging: belongs to ", exits.WRITE, _staging_of_somebody_else, needs="root"),
    Fault("others may write to the staging directory", "{out}.lora-merge-staging: other users can write to it (mode 0777)", exits.WRITE, _staging_for_all),
    Fault("a link is in the place of the staging directory", "{out}.lora-merge-staging: is a link or a file", exits.WRITE, _staging_is_a_link),
    Fault("the output would be built in an input", "{out}: needs {base} as a temporary directory, but the input {base} is in it", exits.WRITE, _staging_is_an_input),
    Fault("the output is inside the base", "{base}/merged: is inside the input {base}", exits.WRITE, _output_is_inside_the_base),
    Fault("the output is inside an input", "{out}: is inside the input {adapter}", exits.WRITE, _output_is_inside_an_input),
    Fault("the output is an input", "{out}: contains the input {base}", exits.WRITE, _output_is_an_input),
    Fault("the base has the adapter merged into it already", "the base already contains this adapter (merged as {adapter}, according to its merge_manifest.json)", exits.PLAN, _merged_before),
)  # fmt: skip


# -------------------------------------------------------------------------------------------- mistakes


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1234\n"


def _swapped(place: Place) -> None:
    place.base, place.adapter = place.adapter, place.base


def _base_is_an_adapter(place: Place) -> None:
    place.base = place.adapter


def _adapter_is_a_model(place: Place) -> None:
    place.adapter = place.base


def _holding(folder: str, *files: str) -> Callable[[Place], None]:
    """Have a folder hold other files than it should."""

    def cause(place: Place) -> None:
        root: Path = getattr(place, folder)
        shutil.rmtree(root)
        for name in files:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("{}")
        root.mkdir(exist_ok=True)

    return cause


def _without(folder: str, name: str) -> Callable[[Place], None]:
    return lambda place: (getattr(place, folder) / name).unlink()


def _instead(folder: str, name: str, content: str) -> Callable[[Place], None]:
    """Have a file hold something else."""
    return lambda place: (getattr(place, folder) / name).write_text(content) and None


def _config(**fields: Any) -> Callable[[Place], None]:
    return lambda place: edit_json(place.adapter / "adapter_config.json", **fields)


def _base_config(**fields: Any) -> Callable[[Place], None]:
    return lambda place: edit_json(place.base / "config.json", **fields)


def _hundred_deep(place: Place) -> None:
    edit_json(place.base / "config.json", x=json.loads("[" * 100 + "]" * 100))


def _no_type(place: Place) -> None:
    (place.adapter / "adapter_config.json").write_text('{"lora_rank": 4}')


def _a_file(place: Place) -> None:
    place.adapter = place.adapter / ADAPTER


def _weight_with_a_comma(place: Place) -> None:
    place.adapter = Path(f"{place.adapter}:0,5")


MISTAKES = (
    Fault("base and adapter are swapped", "--base and --adapter are swapped: {base} is an adapter, and {adapter} is a model", exits.RESOLVE, _swapped),
    Fault("the base is an adapter", "{base}: is an adapter, not a model (it has adapter_config.json)", exits.RESOLVE, _base_is_an_adapter),
    Fault("the adapter is a model", "{adapter}: is a whole model, not an adapter (it has config.json and ", exits.RESOLVE, _adapter_is_a_model),
    Fault("a file is named, not its folder", "adapter_model.safetensors: is a file, expected a directory with the adapter", exits.RESOLVE, _a_file),
    Fault("a weight has a comma", ":0,5: this directory does not exist", exits.RESOLVE, _weight_with_a_comma),
    Fault("the folder is empty", "{base}: is an empty folder", exits.RESOLVE, _holding("base")),
    Fault("the weights were not fetched", "{adapter}: has adapter_config.json and no weights: adapter_model.safetensors", exits.RESOLVE, _without("adapter", ADAPTER)),
    Fault("the index was not fetched", "and their index model.safetensors.index.json is missing", exits.RESOLVE, _without("base", INDEX)),
    Fault("a file is a Git LFS pointer", "{adapter}/adapter_model.safetensors: is a Git LFS pointer", exits.RESOLVE, _instead("adapter", ADAPTER, POINTER)),
    Fault("a file is a web page", "{base}/config.json: is a web page", exits.RESOLVE, _instead("base", "config.json", "<!DOCTYPE html>")),
    Fault("the base is DeepSpeed's", "{base}: has a sharded training state of DeepSpeed ZeRO (zero_to_fp32.py), and no weights", exits.RESOLVE, _holding("base", "config.json", "zero_to_fp32.py")),
    Fault("the base is FSDP's", "{base}: has a sharded training state of FSDP (a/__0_0.distcp), and no weights", exits.RESOLVE, _holding("base", "config.json", "a/__0_0.distcp")),
    Fault("the base is in Mistral's own format", "{base}: has the model in Mistral's or Meta's own format (consolidated.safetensors)", exits.RESOLVE, _holding("base", "config.json", "consolidated.safetensors")),
    Fault("the base is GGUF", "{base}: has the model as GGUF (a.gguf), the format of llama.cpp", exits.RESOLVE, _holding("base", "a.gguf")),
    Fault("the adapter is in a zip file", "{adapter}: contains an archive (a.zip)", exits.RESOLVE, _holding("adapter", "a.zip")),
    Fault("the adapter is one for diffusers", "{adapter}: is a LoRA for diffusers", exits.RESOLVE, _holding("adapter", "pytorch_lora_weights.safetensors")),
    Fault("the adapter is AdapterHub's", "{adapter}: is an adapter of AdapterHub's library adapters", exits.RESOLVE, _holding("adapter", "adapter_config.json", "pytorch_adapter.bin")),
    Fault("the configuration is not PEFT's", "peft_type: is missing, so adapter_config.json is not PEFT's (it has the fields lora_rank)", exits.PLAN, _no_type),
    Fault("lora_alpha is 0", "lora_alpha: is 0, so the scale is 0 and the adapter changes nothing", exits.PLAN, _config(lora_alpha=0)),
)  # fmt: skip


# -------------------------------------------------------------------------------------- hostile inputs


def _header(table: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _shard_of(*arguments: Any, **named: Any) -> Callable[[Place], None]:
    def cause(place: Place) -> None:
        place.shard().write_bytes(_header(*arguments, **named))

    return cause


def _row(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _mapped_to(file: object) -> Callable[[Place], None]:
    def cause(place: Place) -> None:
        table = json.loads((place.base / INDEX).read_text())
        name = next(iter(table["weight_map"]))
        edit_json(place.base / INDEX, weight_map={**table["weight_map"], name: file})

    return cause


def _doubled_key(place: Place) -> None:
    text = (place.base / INDEX).read_text()
    name = next(iter(json.loads(text)["weight_map"]))
    start = '"weight_map": {'
    assert start in text
    (place.base / INDEX).write_text(text.replace(start, f'{start}"{name}": "other.safetensors", '))


def _doubled_row(place: Place) -> None:
    row = json.dumps(_row("F32", [1], 0, 4))
    place.shard().write_bytes(_header(f'{{"a": {row}, "a": {row}}}'.encode(), b"1234"))


def _huge_index(place: Place) -> None:
    """Write an index of ten million entries."""
    with (place.base / INDEX).open("w") as file:
        file.write('{"weight_map": {')
        for start in range(0, 10_000_000, 10_000):
            file.write("".join(f'"{n}":"a.safetensors",' for n in range(start, start + 10_000)))
        file.write('"last":"a.safetensors"}}')


def _deep_json(place: Place) -> None:
    (place.base / "config.json").write_text("[" * 200_000 + "]" * 200_000)


def _long_number(place: Place) -> None:
    (place.adapter / "adapter_config.json").write_text('{"r": ' + "9" * 100_000 + "}")


def _linked(path: Path, place: Place) -> None:
    """Put a link to something else in the place of a file."""
    (place.root / "secret").write_text("the key to the house")
    path.unlink(missing_ok=True)
    path.symlink_to(place.root / "secret")


def _pipe(place: Place) -> None:
    (place.base / "tokenizer.json").unlink(missing_ok=True)
    os.mkfifo(place.base / "tokenizer.json")


def _linked_tokenizer(place: Place) -> None:
    _linked(place.base / "tokenizer.json", place)


def _linked_template(place: Place) -> None:
    _linked(place.adapter / "chat_template.jinja", place)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/lora-merge-bomb",)


def _pickled_code(place: Place) -> None:
    to_pickles(place.base)
    import torch

    torch.save({"x": _Bomb()}, min(place.base.glob("*.bin")))


def _bare_pickle(place: Place) -> None:
    (place.adapter / ADAPTER).unlink()
    (place.adapter / "adapter_model.bin").write_bytes(pickle.dumps(_Bomb()))


def _shared_key(place: Place) -> None:
    """Write a pickle whose table has a tuple as a key that holds itself twice, and so on: hashed, it takes for ever."""
    twice = b"".join(b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(60))
    _pickle_of(place, b"\x80\x02}()q\x00" + twice + b"K\x01u.")


def _deep_key(place: Place) -> None:
    _pickle_of(place, b"\x80\x02}()" + b"\x85" * 1_000_000 + b"K\x01u.")


def _pickle_of(place: Place, content: bytes) -> None:
    (place.adapter / ADAPTER).unlink()
    with zipfile.ZipFile(place.adapter / "adapter_model.bin", "w") as archive:
        archive.writestr("adapter_model/data.pkl", content)


def _many_keys(place: Place) -> None:
    """Write a configuration with a hundred thousand keys, the last of them twice."""
    path = place.adapter / "adapter_config.json"
    keys = "".join(f', "k{n}": 0' for n in range(100_000))
    path.write_text(path.read_text().rstrip().removesuffix("}") + keys + ', "k99999": 0}')


def _lying_dtype(place: Place) -> None:
    content = place.shard().read_bytes()
    assert b'"BF16"' in content
    place.shard().write_bytes(content.replace(b'"BF16"', b'"F32" ', 1))


def _renamed(name: str) -> Callable[[Place], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors.pop(next(iter(tensors)))

    return lambda place: edit_tensors(place.adapter / ADAPTER, change)


def _replaced_by(shape: tuple[int, ...]) -> Callable[[Place], None]:
    def change(tensors: dict[str, Any]) -> None:
        import torch

        name = next(name for name in tensors if "lora_A" in name)
        tensors[name] = torch.zeros(shape)

    return lambda place: edit_tensors(place.adapter / ADAPTER, change)


ESCAPE = "\x1b]0;owned\x07\x1b[2J"

HOSTILE = (
    Fault("the index leads out of the directory", "is mapped to ../../etc/passwd, expected a file inside the model's directory", exits.RESOLVE, _mapped_to("../../etc/passwd")),
    Fault("the index names an absolute path", "is mapped to /etc/passwd.safetensors, expected a file inside", exits.RESOLVE, _mapped_to("/etc/passwd.safetensors")),
    Fault("the index leads out by backslashes", "expected a file inside the model's directory", exits.RESOLVE, _mapped_to("..\\..\\secret.safetensors")),
    Fault("the index names a file that the output writes itself", "is mapped to README.md, expected a name that ends in .safetensors", exits.RESOLVE, _mapped_to("README.md")),
    Fault("the index maps to a number, not a name", "is mapped to 7, expected a file name", exits.RESOLVE, _mapped_to(7)),
    Fault("the index has ten million entries", "{base}/model.safetensors.index.json: has 2", exits.RESOLVE, _huge_index),
    Fault("the index names a tensor twice", "occurs twice", exits.RESOLVE, _doubled_key),
    Fault("one of a hundred thousand keys occurs twice", "the key 'k99999' occurs twice", exits.RESOLVE, _many_keys),
    Fault("JSON is nested without end", "{base}/config.json: is not valid JSON", exits.RESOLVE, _deep_json),
    Fault("a number has a hundred thousand digits", "{adapter}/adapter_config.json: is not valid JSON", exits.RESOLVE, _long_number),
    Fault("a header claims more than its file", "header: claims 4611686018427387904 bytes, expected at most", exits.RESOLVE, _shard_of({}, length=1 << 62)),
    Fault("a header is not JSON", "header: is not valid JSON", exits.RESOLVE, _shard_of(b"\xff\xfe\x00{")),
    Fault("a header is not a table", "header: is a JSON list, expected a table of tensors", exits.RESOLVE, _shard_of([1, 2])),
    Fault("a header names a tensor twice", "the key 'a' occurs twice", exits.RESOLVE, _doubled_row),
    Fault("tensors overlap", "overlaps the tensor before it", exits.RESOLVE, _shard_of({"a": _row("F32", [2], 0, 8), "b": _row("F32", [2], 4, 12)}, bytes(12))),
    Fault("tensors leave a hole", "leaves a gap before it", exits.RESOLVE, _shard_of({"a": _row("F32", [1], 0, 4), "b": _row("F32", [1], 8, 12)}, bytes(12))),
    Fault("an offset is negative", "spans bytes -4 to 0", exits.RESOLVE, _shard_of({"a": _row("F32", [1], -4, 0)})),
    Fault("an offset is beyond 64 bits", "spans bytes 0 to 1180591620717411303424", exits.RESOLVE, _shard_of({"a": _row("F32", [1], 0, 1 << 70)})),
    Fault("an offset is not a whole number", "expected dtype, shape and data_offsets", exits.RESOLVE, _shard_of({"a": _row("F32", [1], 0, 4.0)}, bytes(4))),
    Fault("a size is negative", "has the shape [-1], expected a list of sizes", exits.RESOLVE, _shard_of({"a": _row("F32", [-1], 0, 4)}, bytes(4))),
    Fault("sizes overflow", "expected 73786976294838206464 bytes for F32", exits.RESOLVE, _shard_of({"a": _row("F32", [1 << 32, 1 << 32], 0, 0)})),
    Fault("a dtype is unknown", "has the dtype 'F31', expected one of", exits.RESOLVE, _shard_of({"a": _row("F31", [1], 0, 4)}, bytes(4))),
    Fault("a dtype does not match its bytes", " bytes for F32", exits.RESOLVE, _lying_dtype),
    Fault("metadata is not text", "__metadata__: is ", exits.RESOLVE, _shard_of({"__metadata__": {"format": 7}})),
    Fault("a side file is a pipe", "{base}/tokenizer.json: is a pipe, expected a regular file", exits.RESOLVE, _pipe),
    Fault("a side file links outside its directory", "{base}/tokenizer.json: is a link to ", exits.RESOLVE, _linked_tokenizer),
    Fault("a template of the adapter links outside its directory", "{adapter}/chat_template.jinja: is a link to ", exits.RESOLVE, _linked_template),
    Fault("a .bin file runs code", "posix.system", exits.RESOLVE, _pickled_code),
    Fault("an adapter is a bare pickle that runs code", "{adapter}/adapter_model.bin: ", exits.RESOLVE, _bare_pickle),
    Fault("a tensor's name contains a line break and a false message", "\\nerror: all is well", exits.PLAN, _renamed("base_model.model.x\nerror: all is well.lora_A.weight")),
    Fault("a pickle has a key that takes very long to hash", "has a value of type tuple as a name", exits.RESOLVE, _shared_key),
    Fault("a pickle has a key that is nested a million times", "has a value of type tuple as a name", exits.RESOLVE, _deep_key),
    Fault("a tensor's name steers the terminal", "\\x1b]0;owned\\x07", exits.PLAN, _renamed(f"base_model.model.{ESCAPE}.lora_A.weight")),
    Fault("target_modules explodes", "target_modules: '(.+)+(.+)+(.+)+!' takes more than", exits.PLAN, _config(target_modules="(.+)+(.+)+(.+)+!")),
    Fault("exclude_modules explodes", "exclude_modules: ", exits.PLAN, _config(exclude_modules="(.*.*)*.*(.*.*)*!")),
    Fault("rank_pattern explodes", "rank_pattern: ", exits.PLAN, _config(rank_pattern={"(.+)+(.+)+(.+)+!": 8})),
    Fault("target_modules takes all memory", "needs too much memory to compile or to match", exits.PLAN, _config(target_modules="(?:a?){4000000000}")),
    Fault("thousands of patterns explode together", "takes more than", exits.PLAN, _config(alpha_pattern={f"x{n}(.+)+!": 8 for n in range(5000)} | {"(.+)+(.+)+(.+)+!": 8})),
    Fault("target_modules is not a regular expression", "is not a regular expression", exits.PLAN, _config(target_modules="(q_proj")),
    Fault("target_modules is extremely long", "target_modules: has 300000 characters", exits.PLAN, _config(target_modules="a" * 300_000)),
    Fault("a factor has a wrong shape", " is (", exits.PLAN, _replaced_by((4, 1 << 20))),
    Fault("a configuration counts a billion layers", "{base}/config.json: num_hidden_layers: is 1000000000, expected at most 4096", exits.RESOLVE, _base_config(num_hidden_layers=10**9)),
    Fault("layers times experts are too many", "layers × experts: is 8192000, expected at most 1000000", exits.RESOLVE, _base_config(num_hidden_layers=4000, num_local_experts=2048)),
    Fault("layer_replication goes to a billion", "layer_replication: is [[0, 1000000000]], and the base has 2 layers", exits.PLAN, _config(layer_replication=[[0, 10**9]])),
    Fault("layer_replication repeats too often", "layer_replication: would make 20000 layers, expected at most 4096", exits.PLAN, _config(layer_replication=[[0, 2]] * 10_000)),
    Fault("a tensor's name has a million parts", "has a name of 2000000 characters, expected at most 1000", exits.RESOLVE, _shard_of({"a." * 1_000_000: _row("F32", [1], 0, 4)}, bytes(4))),
    Fault("a tensor has a hundred thousand dimensions", "has the shape [10, 10, ", exits.RESOLVE, _shard_of({"a": _row("F32", [10] * 100_000, 0, 4)}, bytes(4))),
    Fault("a rank is not a number", "r: is 'x', expected a number", exits.PLAN, _config(r="x")),
    Fault("a text contains half of a character", "adapter_config.json: revision: holds half of a character, \\ud800", exits.RESOLVE, _config(revision="\ud800")),
    Fault("a key contains half of a character", "runtime_config: has a key with half of a character, \\udfff", exits.RESOLVE, _config(runtime_config={"\udfff": 1})),
    Fault("a tensor's name contains half of a character", "has a key with half of a character, \\ud800", exits.RESOLVE, _shard_of({"x\ud800": _row("U8", [1], 0, 1)}, b"1")),
    Fault("a number has 400 digits", "adapter_config.json: rank_pattern.q_proj: is a number of 401 digits, expected at most 308", exits.RESOLVE, _config(rank_pattern={"q_proj": 10**400})),
    Fault("tables are nested a hundred deep", "has tables and lists nested more than 64 deep", exits.RESOLVE, _hundred_deep),
    Fault("model_type is a list", "config.json: model_type: is ['llama'], expected a string", exits.RESOLVE, _base_config(model_type=["llama"])),
    Fault("architectures is a table", "config.json: architectures: is {{'a': 1}}, expected a list of class names", exits.RESOLVE, _base_config(architectures={"a": 1})),
    Fault("a pattern table is not a table", "rank_pattern: is False, expected a table of pattern → number", exits.PLAN, _config(rank_pattern=False)),
    Fault("a rank by a pattern is 0", "rank_pattern: gives 'q_proj' the value 0, expected a positive number", exits.PLAN, _config(rank_pattern={"q_proj": 0})),
    Fault("BD-LoRA's modules are not texts", "use_bdlora: has target_modules_bd_a [7], expected a list of strings", exits.PLAN, _config(use_bdlora={"nblocks": 2, "target_modules_bd_a": [7]})),
    Fault("a scale is larger than any float32", "lora_alpha: is 1e+308, expected a number that float32 can hold", exits.PLAN, _config(lora_alpha=1e308)),
    Fault("a scale is infinite", "lora_alpha: is inf, expected a number", exits.PLAN, _config(lora_alpha=float("inf"))),
)  # fmt: skip
