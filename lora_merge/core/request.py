"""One merge as the user asked for it, and how its values are written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from lora_merge.core.shards import parse_size
from lora_merge.errors import RequestError

VerifyLevel = Literal["none", "sample", "full"]
OutputDtype = Literal["bfloat16", "float16", "float32"]
BaseIs = Literal["original", "residual"]
CombineMethod = Literal["linear", "ties", "dare_linear", "dare_ties", "svd"]
Engine = Literal["vllm"]
Link = Literal["copy", "reflink", "hard"]

EXPERT_LAYOUTS = ("out-in", "in-out", "unsloth")

_SHORT_DTYPES: Mapping[str, OutputDtype] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, slots=True)
class Request:
    """What to merge, into what, and how: the command's options, and the keys of a request file."""

    adapter: tuple[str, ...]
    """Adapters: directories or repos, each with ``:WEIGHT`` behind it or not; `parse_adapter` takes them apart."""

    out: str
    """Directory to create."""

    base: str | None = None
    """Base checkpoint: a directory or a repo; default: the adapter's ``base_model_name_or_path``."""

    base_is: BaseIs | None = None
    """What the base is to an adapter whose initialisation changed it: as published, or what that left of it."""

    combine: CombineMethod = "linear"
    """How the changes of several adapters become one."""

    density: float = 0.5
    """Share of the values that ``ties``, ``dare_linear`` and ``dare_ties`` keep of each change."""

    seed: int = 0
    """Of what ``dare_linear`` and ``dare_ties`` drop at random."""

    expert_layout: tuple[str, ...] = ()
    """What cannot be seen of stacked experts: ``out-in`` or ``in-out``, how the base stores a square one in the
    adapter's terms; ``unsloth``, B packed expert by expert."""

    allow_untie: bool = False
    """Untie the embeddings even of a family that engines tie whatever its config says."""

    allow_svd: bool = False
    """Merge methods that decompose the base anew, which another machine may do otherwise."""

    allow_again: bool = False
    """Merge an adapter into a base that has it merged into it already."""

    dtype: OutputDtype | None = None
    """Storage of the output; default: the base's, tensor by tensor."""

    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""

    workers: int | None = None
    """Worker threads, at most; default: the usable cores, up to eight, as memory allows."""

    memory_limit: str | int | None = None
    """For example ``2GB``: what the process may hold in memory; default: what is free."""

    link: Link | None = None
    """How weight files that the merge leaves as they are come into the output: ``copy``; ``reflink``, a copy that
    shares its blocks on the disk; ``hard``, a second name of the base's own file. Default: ``reflink`` where the
    filesystem has it, else ``copy``."""

    max_shard_size: str | int | None = None
    """For example ``5GB``; default: the base's own shards."""

    overwrite: bool = False
    """Replace an existing output, once the new one is whole."""

    resume: bool = False
    """Go on where an interrupted run to the same output stopped, if it was the same merge."""

    verify: VerifyLevel = "sample"
    """How much of the output to check before it gets its name."""

    strict: bool = False
    """Treat warnings as errors."""

    token: str | None = field(default=None, repr=False)
    """For private and gated repos of the Hub; default: ``HF_TOKEN``, or the login. It is written nowhere."""

    offline: bool = False
    """Take what is in the local cache of the Hub, and ask nobody."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True}


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """Which output to hold to what, and how far to go."""

    out: str
    """Directory of the output."""

    base: str | None = None
    """What it was merged into; default: what its manifest names."""

    adapter: tuple[str, ...] = ()
    """What was merged into it; default: what its manifest names."""

    level: Literal["sample", "full"] = "sample"
    """How many rows of each merged tensor to recompute."""

    forward: bool = False
    """Compare what base and adapter compute with what the merged checkpoint computes."""

    engine: Engine | None = None
    """Ask this engine too."""

    engine_python: str | None = None
    """The Python interpreter that has it; default: this one."""

    prompt: tuple[str, ...] = ()
    """Texts to ask; default: a few built-in ones, and tokens drawn from the vocabulary."""

    n_tokens: int = 8
    """How many tokens each is to be answered with."""

    tolerance: float | None = None
    """Largest difference of two logits that passes; default: what rounding explains, measured."""

    dtype: OutputDtype = "float32"
    """What the models compute in."""

    trust_remote_code: bool = False
    """Run the code that the checkpoint carries, where transformers has no class for the model."""

    strict: bool = False
    token: str | None = field(default=None, repr=False)
    offline: bool = False


def parse_adapter(text: object) -> tuple[str, float]:
    """Return the place and the weight of one adapter.

    Example:
        >>> parse_adapter("my-lora:0.5"), parse_adapter("org/my-lora@v1")
        (('my-lora', 0.5), ('org/my-lora@v1', 1.0))

    Raises:
        ValueError: it is no text, or the weight is not finite.
    """
    if not isinstance(text, str) or not text:
        raise ValueError(
            f"{text!r} is no adapter, expected a directory, or a directory and a weight: DIR:0.5"
        )
    path, colon, weight = text.rpartition(":")
    try:
        value = float(weight)
    except ValueError:
        return text, 1.0
    if not colon or not path:
        return text, 1.0
    if not math.isfinite(value):
        raise ValueError(f"{text!r} has the weight {weight}, expected a number")
    return path, value


def parse_adapters(value: object) -> tuple[str, ...]:
    """Return one adapter or several, once their weights are known to parse.

    Raises:
        ValueError: there is none, or one does not parse.
    """
    texts = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not texts:
        raise ValueError("names no adapter, expected one or more")
    for text in texts:
        parse_adapter(text)
    return tuple(map(str, texts))


def parse_expert_layout(value: object) -> tuple[str, ...]:
    """Return what is said of stacked experts.

    Raises:
        ValueError: a word is unknown, or two contradict each other.
    """
    words = tuple(map(str, value)) if isinstance(value, list | tuple) else (str(value),)
    for word in words:
        if word not in EXPERT_LAYOUTS:
            known = f"{', '.join(EXPERT_LAYOUTS[:-1])} or {EXPERT_LAYOUTS[-1]}"
            raise ValueError(f"{word!r} is no layout of experts, expected {known}")
    if {"out-in", "in-out"} <= set(words):
        raise ValueError("says both out-in and in-out, expected one of them")
    return words


def parse_density(value: str | float) -> float:
    """Return a share of values.

    Raises:
        ValueError: it is no number above 0 and at most 1.
    """
    try:
        density = 0.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        density = 0.0
    if not 0 < density <= 1:
        raise ValueError(f"{value!r} is no density, expected a number above 0 and at most 1")
    return density


def parse_seed(value: str | int) -> int:
    """Return a seed.

    Raises:
        ValueError: it is no whole number from 0 to 2³¹ - 1.
    """
    if not str(value).isdecimal() or int(value) >= 2**31:
        raise ValueError(f"{value!r} is no seed, expected a whole number from 0 to {2**31 - 1}")
    return int(value)


def parse_choice(kind: Any, name: str) -> Callable[[str], str]:
    """Return a parser of the values of a ``Literal``, which raises ``ValueError`` for any other."""
    known = get_args(kind)

    def parse(text: str) -> str:
        if text not in known:
            choice = " or ".join(filter(None, (", ".join(known[:-1]), known[-1])))
            raise ValueError(f"{text!r} is no {name}, expected {choice}")
        return text

    return parse


def parse_dtype(text: str) -> OutputDtype:
    """Return a dtype as torch spells it.

    Example:
        >>> parse_dtype("bf16")
        'bfloat16'

    Raises:
        ValueError: it is no dtype that an output can have.
    """
    for short, full in _SHORT_DTYPES.items():
        if str(text).lower() in {short, full}:
            return full
    known = ", ".join(f"{full} ({short})" for short, full in _SHORT_DTYPES.items())
    raise ValueError(f"{text!r} is no dtype, expected one of {known}")


def parse_device(text: str) -> str:
    """Return a device name as it is.

    Raises:
        ValueError: it is none.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(text)):
        raise ValueError(f"{text!r} is no device, expected auto, cpu, cuda or cuda:N")
    return str(text)


def parse_size_text(text: str | int) -> str | int:
    """Return a size as it is written, once it is known to parse.

    Raises:
        ValueError: it is no size.
    """
    parse_size(text)
    return text


def parse_token(text: object) -> str:
    """Return an access token as it is.

    Raises:
        ValueError: it cannot be one. The sentence does not repeat it.
    """
    if not isinstance(text, str) or not re.fullmatch(r"[!-~]+", text):
        raise ValueError("is no token, expected letters and digits without spaces")
    return text


def parse_tolerance(value: str | float) -> float:
    """Return a difference of logits.

    Raises:
        ValueError: it is no number of 0 or more.
    """
    try:
        tolerance = -1.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        tolerance = -1.0
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"{value!r} is no tolerance, expected a difference of logits, 0 or more")
    return tolerance


def parse_n_tokens(value: str | int) -> int:
    """Return a number of tokens.

    Raises:
        ValueError: it is no whole number from 1 to 1024.
    """
    if isinstance(value, bool) or not str(value).isdecimal() or not 1 <= int(value) <= 1024:
        raise ValueError(f"{value!r} is no number of tokens, expected a whole number from 1 to 1024")
    return int(value)


def parse_workers(text: str | int) -> int:
    """Return a number of workers.

    Raises:
        ValueError: it is no whole number, or less than one.
    """
    if not str(text).isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is no number of workers, expected 1 or more")
    return int(text)


PARSERS: Mapping[str, Callable[..., object]] = {
    "adapter": parse_adapters,
    "base_is": parse_choice(BaseIs, "kind of base"),
    "combine": parse_choice(CombineMethod, "way to combine"),
    "density": parse_density,
    "expert_layout": parse_expert_layout,
    "seed": parse_seed,
    "dtype": parse_dtype,
    "device": parse_device,
    "link": parse_choice(Link, "way to link"),
    "max_shard_size": parse_size_text,
    "memory_limit": parse_size_text,
    "token": parse_token,
    "verify": parse_choice(VerifyLevel, "level of verification"),
    "workers": parse_workers,
    "tolerance": parse_tolerance,
    "n_tokens": parse_n_tokens,
    "engine": parse_choice(Engine, "engine"),
    "level": parse_choice(Literal["sample", "full"], "level"),
}
"""How the values that a type cannot describe are checked, wherever they come from."""


def parse_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a request with their values parsed; None stays None.

    Raises:
        RequestError: a value does not parse; it names the key.
    """
    parsed = dict(values)
    for key, parse in PARSERS.items():
        if parsed.get(key) is not None:
            try:
                parsed[key] = parse(parsed[key])
            except ValueError as exc:
                raise RequestError("", 0, key, str(exc)) from exc
    return parsed
