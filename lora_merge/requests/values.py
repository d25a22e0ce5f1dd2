"""Parsers of options: a value as people write it → the request's value, or ``ValueError`` with a sentence."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final, get_args

from lora_merge.requests.choices import ExpertLayout, OutputDtype
from lora_merge.requests.inputs import adapter_texts, checked_weight
from lora_merge.requests.sizes import parse_size
from lora_merge.words import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lora_merge.requests.option import Names

# More than the side of any matrix, and more threads than any machine can run.
MOST_RANK: Final = 1 << 16
MOST_WORKERS: Final = 1024
MOST_MESSAGE: Final = 200

_SHORT_DTYPES: Final[Mapping[str, OutputDtype]] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def parse_adapter(text: object) -> tuple[str, float]:
    """Return the place and the weight of one adapter; 1.0 if none is given.

    Example:
        >>> parse_adapter("my-lora:0.5"), parse_adapter("org/my-lora@v1")
        (('my-lora', 0.5), ('org/my-lora@v1', 1.0))

    Raises:
        ValueError: it is not a text, or the weight is 0 or not finite.
    """
    (text,) = adapter_texts((text,))
    path, colon, weight = text.rpartition(":")
    try:
        value = float(weight)
    except ValueError:
        return text, 1.0
    # A name that is a number, and ``:0.5`` without a path, are names.
    if not colon or not path:
        return text, 1.0
    return path, checked_weight(text, value)


def parse_adapters(value: object) -> tuple[str, ...]:
    """Return one adapter or several as texts, after each was checked.

    Raises:
        ValueError: there is no adapter, or one does not parse.
    """
    if value is None:
        raise ValueError("is None, expected an adapter")
    texts = adapter_texts(value)
    for text in texts:
        parse_adapter(text)
    return texts


def parse_expert_layout(value: object) -> tuple[str, ...]:
    """Return the words of ``--expert-layout`` as a tuple.

    Raises:
        ValueError: a word is unknown, or two contradict each other.
    """
    words = tuple(value) if isinstance(value, list | tuple) else (value,)
    layouts = get_args(ExpertLayout)
    for word in words:
        if word not in layouts:
            known = f"{', '.join(layouts[:-1])} or {layouts[-1]}"
            raise ValueError(f"{shown(word)} is not a known layout of experts, expected {known}")
    if {"out-in", "in-out"} <= set(words):
        raise ValueError("has both out-in and in-out, expected one of them")
    return words


def parse_file_names(value: object) -> tuple[str, ...]:
    """Return one file name or several as a tuple, without a leading ``./``.

    Raises:
        ValueError: a name is empty or leads out of the folder.
    """
    names = tuple(value) if isinstance(value, list | tuple) else (value,)
    for name in names:
        # A name must not lead out of the adapter's folder.
        if not isinstance(name, str) or not name.strip("/") or ".." in name.split("/"):
            raise ValueError(f"{shown(name)} is not a file name in the adapter's folder")
    return tuple(name.removeprefix("./") for name in map(str, names))


def parse_density(value: str | float) -> float:
    """Return the share of values that are kept, above 0 and at most 1.

    Raises:
        ValueError: it is not such a number.
    """
    try:
        density = 0.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        density = 0.0
    if not 0 < density <= 1:
        raise ValueError(f"{shown(value)} is not a density, expected a number above 0 and at most 1")
    return density


def parse_seed(value: str | int) -> int:
    """Return a seed from 0 to 2³¹ - 1.

    Raises:
        ValueError: it is not such a whole number.
    """
    return _whole(value, "seed", 2**31 - 1, least=0)


def parse_choice(kind: Any, name: str) -> Callable[[str], str]:
    """Return a parser of the values of a ``Literal``, which raises ``ValueError`` for any other."""
    return parse_name(lambda: get_args(kind), name)


def parse_name(names: Names, name: str) -> Callable[[str], str]:
    """Return a parser of the keys of a table, which raises ``ValueError`` for any other text.

    Args:
        names: asked for when a value is parsed.
        name: what a value is called in the sentence.
    """

    def parse(text: str) -> str:
        known = names()
        if text not in known:
            choice = " or ".join(filter(None, (", ".join(known[:-1]), known[-1])))
            raise ValueError(f"{shown(text)} is not a known {name}, expected {choice}")
        return text

    return parse


def parse_branch(text: object) -> str:
    """Return the name of a branch.

    Raises:
        ValueError: Git does not allow it, or it is not one.
    """
    if not isinstance(text, str) or not re.fullmatch(r"(?!refs/|[/.-])(?!.*\.\.)[\w./-]+(?<![/.])", text):
        raise ValueError(f"is {shown(text)}, expected the name of a branch, such as main")
    return text


def parse_message(text: object) -> str:
    """Return the message of a commit.

    Raises:
        ValueError: it is empty, or too long for the title of a pull request.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError("is empty, expected the message of a commit")
    if "\n" in text or len(text) > MOST_MESSAGE:
        raise ValueError(
            f"is too long or has several lines, expected one line of at most {MOST_MESSAGE} characters"
        )
    return text.strip()


def parse_dtype(text: str) -> OutputDtype:
    """Return a dtype as torch spells it. Short names and a leading ``torch.`` are accepted.

    Example:
        >>> parse_dtype("bf16")
        'bfloat16'

    Raises:
        ValueError: it is not a dtype that an output can have.
    """
    for short, full in _SHORT_DTYPES.items():
        if str(text).lower().removeprefix("torch.") in {short, full}:
            return full
    known = ", ".join(f"{full} ({short})" for short, full in _SHORT_DTYPES.items())
    raise ValueError(f"{shown(text)} is not a known dtype, expected one of {known}")


def parse_device(text: str) -> str:
    """Return ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. Whether the device exists is checked later.

    Raises:
        ValueError: it is something else.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(text)):
        raise ValueError(f"{shown(text)} is not a known device, expected auto, cpu, cuda or cuda:N")
    return str(text)


def parse_size_text(text: str | int) -> str | int:
    """Return a size as it was written, after checking that it parses.

    Raises:
        ValueError: it is not a size.
    """
    parse_size(text)
    return text


def parse_token(text: object) -> str:
    """Return an access token.

    Raises:
        ValueError: it has other characters than printable ASCII. The sentence does not repeat it.
    """
    if not isinstance(text, str) or not re.fullmatch(r"[!-~]+", text):
        raise ValueError("is not a token, expected letters and digits without spaces")
    return text


def parse_tolerance(value: str | float) -> float:
    """Return a difference of logits, 0 or more.

    Raises:
        ValueError: it is not such a number.
    """
    try:
        tolerance = -1.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        tolerance = -1.0
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"{shown(value)} is not a tolerance, expected a difference of logits, 0 or more")
    return tolerance


def parse_n_tokens(value: str | int) -> int:
    """Return a number of tokens from 1 to 1024.

    Raises:
        ValueError: it is not such a whole number.
    """
    return _whole(value, "number of tokens", 1024)


def parse_rank(value: str | int) -> int:
    """Return a rank from 1 to `MOST_RANK`.

    Raises:
        ValueError: it is not such a whole number.
    """
    return _whole(value, "rank", MOST_RANK)


def parse_energy(value: str | float) -> float:
    """Return a share of energy, above 0 and at most 1. Percentages are accepted.

    Example:
        >>> parse_energy("0.99"), parse_energy("99%")
        (0.99, 0.99)

    Raises:
        ValueError: it is not such a number.
    """
    text = str(value)
    try:
        energy = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        energy = 0.0
    if isinstance(value, bool) or not 0 < energy <= 1:
        raise ValueError(
            f"{shown(value)} is not a share of energy, expected a number above 0 and at most 1, such as 0.99"
        )
    return energy


def parse_workers(text: str | int) -> int:
    """Return a number of workers from 1 to `MOST_WORKERS`.

    Raises:
        ValueError: it is not such a whole number.
    """
    return _whole(text, "number of workers", MOST_WORKERS)


def parse_retries(text: str | int) -> int:
    """Return a number of retries from 0 to 100.

    Raises:
        ValueError: it is not such a whole number.
    """
    return _whole(text, "number of retries", 100, least=0)


def parse_part(text: object) -> str:
    """Return ``2/8``, ``auto`` or ``auto/8`` as it is.

    Raises:
        ValueError: it is something else, or the number is beyond the last part.
    """
    match = re.fullmatch(r"auto(?:/([1-9]\d{0,5}))?|([1-9]\d{0,5})/([1-9]\d{0,5})", str(text))
    if match is None:
        raise ValueError(f"{shown(text)} is not a part, expected 2/8, auto or auto/8, for example")
    if match[2] and int(match[2]) > int(match[3]):
        raise ValueError(
            f"{shown(text)} is not a part, expected a number from 1 to {match[3]} before the slash"
        )
    return str(text)


def _whole(value: object, thing: str, most: int, least: int = 1) -> int:
    """Return a whole number from ``least`` to ``most``. ``thing`` is what the error calls it.

    Raises:
        ValueError: it is something else.
    """
    # In Python True is an int.
    text = "" if isinstance(value, bool) else str(value)
    if not re.fullmatch(r"\d{1,10}", text) or not least <= int(text) <= most:
        raise ValueError(f"{shown(value)} is not a {thing}, expected a whole number from {least} to {most}")
    return int(text)
