"""The kinds of values: one `Kind` for each sort of option."""

from __future__ import annotations

from typing import Any, get_args

from lora_merge.requests import values
from lora_merge.requests.choices import (
    AdapterFormat,
    BaseIs,
    Copies,
    Engine,
    ExpertForm,
    ExpertLayout,
    Link,
    Naming,
    OutputDtype,
    OutputStorage,
    ProofLevel,
    RoundingMethod,
    Shell,
    UploadWay,
    VerifyLevel,
    Visibility,
)
from lora_merge.requests.inputs import path_text, switch, texts
from lora_merge.requests.option import Kind


def _combinations() -> tuple[str, ...]:
    from lora_merge.deltas import COMBINATIONS

    return ("linear", *COMBINATIONS)  # a weighted sum is what the algebras do by themselves


def _executors() -> tuple[str, ...]:
    from lora_merge import executors

    return executors.choices()


def _ray_address(text: object) -> str:
    from lora_merge.executors.ray.address import parse_address

    return parse_address(text)


def _schemes() -> tuple[str, ...]:
    from lora_merge.quantised.schemes import SCHEMES

    return tuple(SCHEMES)


def _serving_engines() -> tuple[str, ...]:
    from lora_merge.serving import ENGINES

    return tuple(ENGINES)


def _shown(choice: Any) -> str:
    """Return how help shows the values of a ``Literal``: ``[v4|v5]``."""
    return f"[{'|'.join(get_args(choice))}]"


SWITCH = Kind("bool", switch)
TEXTS = Kind("tuple[str, ...]", texts, "TEXT", is_many=True)
MODULES = Kind("tuple[str, ...]", metavar="MODULE", is_many=True)
NAMES = Kind("tuple[str, ...]", texts, "NAME", is_many=True)

PLACE = Kind("str", path_text, "DIR|ID", is_path=True)
"""A directory, or a repo of the Hub."""

NEW_FILE = Kind("str", path_text, "FILE", is_path=True)
INTERPRETER = Kind("str", path_text, "PATH", is_path=True)
READ_FILE = Kind("str", metavar="FILE", file="existing")
LOG_FILE = Kind("str", metavar="FILE", file="new")
FOLDER = Kind("str", path_text, "DIR", is_path=True)
OUTPUT = Kind("str", metavar="DIR", is_path=True, file="any")
"""A `FOLDER` without a parser: in a YAML file, the check of all types says what is wrong with it."""

ADAPTERS = Kind(
    "tuple[str, ...]", values.parse_adapters, "DIR|ID[:WEIGHT]", is_many=True, accepts="AdapterPaths"
)
FILE_NAMES = Kind("tuple[str, ...]", values.parse_file_names, "NAME", is_many=True)
LAYOUTS = Kind("tuple[str, ...]", values.parse_expert_layout, choices=get_args(ExpertLayout), is_many=True)

BASE_IS = Kind("BaseIs", values.parse_choice(BaseIs, "kind of base"), _shown(BaseIs))
COMBINE = Kind("str", values.parse_name(_combinations, "way to combine"), names=_combinations)
OUT_STORAGE = Kind("OutputStorage", values.parse_choice(OutputStorage, "way to store"), _shown(OutputStorage))
ROUNDING = Kind("RoundingMethod", values.parse_choice(RoundingMethod, "way to round"), _shown(RoundingMethod))
SCHEME = Kind("str", values.parse_name(_schemes, "scheme"), metavar="SCHEME", names=_schemes, accepts="str")
DTYPE = Kind("OutputDtype", values.parse_dtype, _shown(OutputDtype))
ENGINE = Kind("Engine", values.parse_choice(Engine, "engine"), _shown(Engine))
EXPERTS = Kind("ExpertForm", values.parse_choice(ExpertForm, "form of experts"))
FORMAT = Kind(
    "AdapterFormat",
    values.parse_choice(AdapterFormat, "format of an adapter"),
    choices=get_args(AdapterFormat),
)
LEVEL = Kind("ProofLevel", values.parse_choice(ProofLevel, "level"), choices=get_args(ProofLevel))
EXECUTOR = Kind("str", values.parse_name(_executors, "executor"), names=_executors)
COPIES = Kind("Copies", values.parse_choice(Copies, "way to copy"), choices=get_args(Copies))
UPLOAD = Kind("UploadWay", values.parse_choice(UploadWay, "way to upload"), choices=get_args(UploadWay))
VISIBILITY = Kind("Visibility", values.parse_choice(Visibility, "visibility"))
REPO = Kind("str", path_text, "ORG/NAME")
BRANCH = Kind("str", values.parse_branch, "BRANCH")
MESSAGE = Kind("str", values.parse_message, "TEXT")
LINK = Kind("Link", values.parse_choice(Link, "way to link"), _shown(Link))
SHELL = Kind("Shell", values.parse_choice(Shell, "shell"), choices=get_args(Shell))
NAMING = Kind("Naming", values.parse_choice(Naming, "naming"), choices=get_args(Naming))
SERVING = Kind(
    "str", values.parse_name(_serving_engines, "engine"), names=_serving_engines, is_completed=True
)
VERIFY = Kind(
    "VerifyLevel",
    values.parse_choice(VerifyLevel, "level of verification"),
    choices=("sample", "full"),  # none has its own flag: --no-verify
)

DENSITY = Kind("float", values.parse_density, "SHARE")
DEVICE = Kind("str", values.parse_device, "[auto|cpu|cuda|cuda:N]")
ENERGY = Kind("float", values.parse_energy, "SHARE")
N_TOKENS = Kind("int", values.parse_n_tokens, "N")
RANK = Kind("int", values.parse_rank, "N")
SEED = Kind("int", values.parse_seed, "N")
SIZE = Kind("str | int", values.parse_size_text, "SIZE")
TOKEN = Kind("str", values.parse_token, "TEXT")
TOLERANCE = Kind("float", values.parse_tolerance, "LOGITS")
RAY_ADDRESS = Kind("str", _ray_address, "[auto|local|HOST:PORT]")
RETRIES = Kind("int", values.parse_retries, "N")
PART = Kind("str", values.parse_part, "I/N")
WORKERS = Kind("int", values.parse_workers, "N")
