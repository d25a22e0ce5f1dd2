"""One merge as the user asked for it, and how its values are written."""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_args

from lora_merge.core.choices import (
    AdapterFormat,
    BaseIs,
    CombineMethod,
    Engine,
    ExpertForm,
    ExpertLayout,
    Link,
    Naming,
    OutputDtype,
    ProofLevel,
    ServingEngine,
    VerifyLevel,
)
from lora_merge.core.inputs import adapter_texts, checked_weight, path_text, switch
from lora_merge.core.shards import parse_size
from lora_merge.errors import RequestError
from lora_merge.words import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

DENSITY = 0.5
"""Where none is given."""

MOST_RANK = 1 << 16
MOST_WORKERS = 1024

EXPERT_LAYOUTS = get_args(ExpertLayout)

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

    density: float = DENSITY
    """Share of the values that ``ties``, ``dare_linear`` and ``dare_ties`` keep of each change."""

    seed: int = 0
    """Of what ``dare_linear`` and ``dare_ties`` drop at random."""

    expert_layout: tuple[str, ...] = ()
    """What cannot be seen of stacked experts: ``out-in`` or ``in-out``, how the base stores a square one in the
    adapter's terms; ``unsloth``, B packed expert by expert."""

    ignore_file: tuple[str, ...] = ()
    """Files in the adapters' folders that are not read though they may hold weights."""

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

    level: ProofLevel = "sample"
    """How many rows of each merged tensor to recompute; ``structure`` compares the output with nothing."""

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

    ignore_file: tuple[str, ...] = ()
    strict: bool = False
    token: str | None = field(default=None, repr=False)
    offline: bool = False


@dataclass(frozen=True, slots=True)
class InspectRequest:
    """Which adapter to describe, and against which base."""

    adapter: str
    """A directory or a repo."""

    base: str | None = None
    """What to hold it against; default: nothing, its own files alone."""

    base_is: BaseIs | None = None
    expert_layout: tuple[str, ...] = ()
    ignore_file: tuple[str, ...] = ()
    serving: ServingEngine | None = None
    """Report on this engine only; default: all."""

    plot: str | None = None
    """File to draw a heat map of layers and modules into: ``.png``, ``.svg`` or ``.html``."""

    strict: bool = False
    token: str | None = field(default=None, repr=False)
    offline: bool = False


@dataclass(frozen=True, slots=True)
class ConvertRequest:
    """Which adapter to rewrite, and how."""

    adapter: str
    """A directory or a repo."""

    out: str
    """Directory to create."""

    base: str | None = None
    """What the adapter belongs to; default, where it is needed: what the adapter names."""

    format: AdapterFormat = "peft"
    serving: ServingEngine | None = None
    """Do whatever this engine needs: ``--for ENGINE``."""

    expand_targets: bool = False
    """List the modules that are adapted, in place of a regex, patterns of layers and exclusions."""

    bake_scale: bool = False
    """Fold every scale into B, so that α/r is 1."""

    rank: int | None = None
    """Keep at most so many singular values of each module's change."""

    energy: float | None = None
    """Keep as many as make up this share of the sum of their squares."""

    pad_rank: int | None = None
    """Give every module this rank."""

    to_lora: bool = False
    """Make plain LoRA of any other kind of adapter."""

    rename: Naming | None = None
    """Name modules as transformers 4, or as transformers 5 does."""

    experts: ExpertForm | None = None
    """``split``: LoRA on every expert by itself; ``fuse``: on the parameters that hold them all."""

    dtype: OutputDtype | None = None
    """Of the factors; default: the adapter's, where it holds them exactly, else float32."""

    base_is: BaseIs | None = None
    expert_layout: tuple[str, ...] = ()
    ignore_file: tuple[str, ...] = ()
    allow_svd: bool = False
    overwrite: bool = False
    strict: bool = False
    token: str | None = field(default=None, repr=False)
    offline: bool = False


@dataclass(frozen=True, slots=True)
class ExtractRequest:
    """Which training to take apart into a LoRA."""

    base: str
    """What was trained: a directory or a repo."""

    tuned: str
    """What came of it."""

    out: str
    """Directory to create."""

    rank: int | None = None
    """Of every module, at most."""

    energy: float | None = None
    """Share of each module's change that is kept, at least."""

    target: tuple[str, ...] = ()
    """Modules to take, by the ends of their paths; default: every linear layer that changed."""

    save_modules: bool = False
    """Carry what no LoRA can hold (embeddings, norms) whole, in ``modules_to_save``."""

    dtype: OutputDtype | None = None
    overwrite: bool = False
    strict: bool = False
    token: str | None = field(default=None, repr=False)
    offline: bool = False


def parse_adapter(text: object) -> tuple[str, float]:
    """Return the place and the weight of one adapter.

    Example:
        >>> parse_adapter("my-lora:0.5"), parse_adapter("org/my-lora@v1")
        (('my-lora', 0.5), ('org/my-lora@v1', 1.0))

    Raises:
        ValueError: it is no text, or the weight is 0 or not finite.
    """
    (text,) = adapter_texts((text,))
    path, colon, weight = text.rpartition(":")
    try:
        value = float(weight)
    except ValueError:
        return text, 1.0
    if not colon or not path:
        return text, 1.0
    return path, checked_weight(text, value)


def parse_adapters(value: object) -> tuple[str, ...]:
    """Return one adapter or several, once their weights are known to parse.

    Raises:
        ValueError: there is none, or one does not parse.
    """
    texts = adapter_texts(value)
    for text in texts:
        parse_adapter(text)
    return texts


def parse_expert_layout(value: object) -> tuple[str, ...]:
    """Return what is said of stacked experts.

    Raises:
        ValueError: a word is unknown, or two contradict each other.
    """
    words = tuple(value) if isinstance(value, list | tuple) else (value,)
    for word in words:
        if word not in EXPERT_LAYOUTS:
            known = f"{', '.join(EXPERT_LAYOUTS[:-1])} or {EXPERT_LAYOUTS[-1]}"
            raise ValueError(f"{shown(word)} is no layout of experts, expected {known}")
    if {"out-in", "in-out"} <= set(words):
        raise ValueError("says both out-in and in-out, expected one of them")
    return words


def parse_file_names(value: object) -> tuple[str, ...]:
    """Return the names of files, one or several.

    Raises:
        ValueError: one is no name of a file inside a folder.
    """
    names = tuple(value) if isinstance(value, list | tuple) else (value,)
    for name in names:
        if not isinstance(name, str) or not name.strip("/") or ".." in name.split("/"):
            raise ValueError(f"{shown(name)} is not the name of a file in the adapter's folder")
    return tuple(name.removeprefix("./") for name in map(str, names))


def parse_density(value: str | float) -> float:
    """Return a share of values.

    Raises:
        ValueError: it is no number above 0 and at most 1.
    """
    try:
        density = 0.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        density = 0.0
    if not 0 < density <= 1:
        raise ValueError(f"{shown(value)} is no density, expected a number above 0 and at most 1")
    return density


def parse_seed(value: str | int) -> int:
    """Return a seed.

    Raises:
        ValueError: it is no whole number from 0 to 2³¹ - 1.
    """
    return _whole(value, "seed", 2**31 - 1, least=0)


def parse_choice(kind: Any, name: str) -> Callable[[str], str]:
    """Return a parser of the values of a ``Literal``, which raises ``ValueError`` for any other."""
    known = get_args(kind)

    def parse(text: str) -> str:
        if text not in known:
            choice = " or ".join(filter(None, (", ".join(known[:-1]), known[-1])))
            raise ValueError(f"{shown(text)} is no {name}, expected {choice}")
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
        if str(text).lower().removeprefix("torch.") in {short, full}:
            return full
    known = ", ".join(f"{full} ({short})" for short, full in _SHORT_DTYPES.items())
    raise ValueError(f"{shown(text)} is no dtype, expected one of {known}")


def parse_device(text: str) -> str:
    """Return a device name as it is.

    Raises:
        ValueError: it is none.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(text)):
        raise ValueError(f"{shown(text)} is no device, expected auto, cpu, cuda or cuda:N")
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
    except (TypeError, ValueError, OverflowError):
        tolerance = -1.0
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"{shown(value)} is no tolerance, expected a difference of logits, 0 or more")
    return tolerance


def parse_n_tokens(value: str | int) -> int:
    """Return a number of tokens.

    Raises:
        ValueError: it is no whole number from 1 to 1024.
    """
    return _whole(value, "number of tokens", 1024)


def parse_rank(value: str | int) -> int:
    """Return a rank.

    Raises:
        ValueError: it is no whole number, less than one, or larger than any matrix has.
    """
    return _whole(value, "rank", MOST_RANK)


def parse_energy(value: str | float) -> float:
    """Return a share of energy.

    Example:
        >>> parse_energy("0.99"), parse_energy("99%")
        (0.99, 0.99)

    Raises:
        ValueError: it is no number above 0 and at most 1.
    """
    text = str(value)
    try:
        energy = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        energy = 0.0
    if isinstance(value, bool) or not 0 < energy <= 1:
        raise ValueError(
            f"{shown(value)} is no share of energy, expected a number above 0 and at most 1, such as 0.99"
        )
    return energy


def parse_workers(text: str | int) -> int:
    """Return a number of workers.

    Raises:
        ValueError: it is no whole number, less than one, or more than a machine can run.
    """
    return _whole(text, "number of workers", MOST_WORKERS)


def _whole(value: object, thing: str, most: int, least: int = 1) -> int:
    """Return a whole number between two limits.

    Raises:
        ValueError: it is something else.
    """
    text = "" if isinstance(value, bool) else str(value)
    if not re.fullmatch(r"\d{1,10}", text) or not least <= int(text) <= most:
        raise ValueError(f"{shown(value)} is no {thing}, expected a whole number from {least} to {most}")
    return int(text)


PARSERS: Mapping[str, Callable[..., object]] = {
    "adapter": parse_adapters,
    "base_is": parse_choice(BaseIs, "kind of base"),
    "combine": parse_choice(CombineMethod, "way to combine"),
    "density": parse_density,
    "expert_layout": parse_expert_layout,
    "ignore_file": parse_file_names,
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
    "rank": parse_rank,
    "pad_rank": parse_rank,
    "energy": parse_energy,
    "rename": parse_choice(Naming, "naming"),
    "experts": parse_choice(ExpertForm, "form of experts"),
    "format": parse_choice(AdapterFormat, "format of an adapter"),
    "serving": parse_choice(ServingEngine, "engine"),
    "level": parse_choice(ProofLevel, "level"),
}
"""How the values that a type cannot describe are checked, wherever they come from."""

_PATHS = ("base", "tuned", "engine_python", "plot")

_SWITCHES = tuple(
    sorted(
        {
            field.name
            for kind in (Request, VerifyRequest, InspectRequest, ConvertRequest, ExtractRequest)
            for field in fields(kind)
            if field.type == "bool"
        }
    )
)

_CHECKS: Mapping[str, Callable[..., object]] = {
    **dict.fromkeys(_PATHS, path_text),
    **dict.fromkeys(_SWITCHES, switch),
    **PARSERS,
}


def parse_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a request with their values parsed; None stays None.

    Raises:
        RequestError: a value does not parse; it names the key.
    """
    parsed = dict(values)
    for key, parse in _CHECKS.items():
        if parsed.get(key) is not None:
            try:
                parsed[key] = parse(parsed[key])
            except ValueError as exc:
                raise RequestError("", 0, key, str(exc)) from exc
    return parsed


AdapterRequest = TypeVar("AdapterRequest", InspectRequest, ConvertRequest, ExtractRequest)


def parse_request(kind: type[AdapterRequest], values: Mapping[str, Any]) -> AdapterRequest:
    """Return a request about one adapter: what was given is parsed, the rest has its default.

    Raises:
        RequestError: a value does not parse; it names the key.
    """
    given = {name: value for name, value in values.items() if value is not None and value != ()}
    needed = [field.name for field in fields(kind) if field.default is MISSING]
    places: dict[str, Any] = {}
    for name in needed:
        try:
            places[name] = path_text(given.pop(name, None))
        except ValueError as exc:
            raise RequestError("", 0, name, str(exc)) from exc
    return kind(**places, **parse_fields(given))
