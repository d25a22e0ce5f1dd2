"""Batch files: YAML → jobs, with wildcards, matrices and templates. Errors name the line and the key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lora_merge.batches.job import Job
from lora_merge.batches.wildcards import WILD, matches
from lora_merge.errors import RequestError, ResolveError
from lora_merge.requests.inputs import adapter_texts
from lora_merge.requests.parsing import parse_request, parse_values
from lora_merge.requests.request import ConvertRequest, Request
from lora_merge.requests.request_file import close_hint, validated
from lora_merge.requests.table import fields_of
from lora_merge.requests.values import parse_adapter
from lora_merge.requests.yaml_file import parse_yaml
from lora_merge.storage.objects.urls import is_store_url
from lora_merge.storage.user_paths import is_there, output_path
from lora_merge.words import quoted, shown

if TYPE_CHECKING:
    import yaml

_MERGE_KEYS = frozenset(option.key for option in fields_of("merge")) - {"report"}  # a batch has one page
_CONVERT_KEYS = frozenset(option.key for option in fields_of("convert")) - {"convert"}
_OWN_KEYS = frozenset({"name", "matrix", "convert"})
_TOP_KEYS = ("defaults", "jobs")

_OF_THE_BATCH: Mapping[str, str] = {"report": "lora-merge batch --report FILE writes one page for all jobs"}
"""Keys of a request file that a job cannot have → what to do instead."""

MAX_JOBS = 10_000
"""Most jobs of a batch."""

_FIELD = re.compile(r"\{(\w*)\}")

_SPELT = {option.name: option.key for option in fields_of("convert")}
"""Field of a conversion → its key in a batch file."""

_FIELDS = sorted((*fields_of("merge"), *fields_of("convert")), key=lambda option: not option.is_required)

_GLOBBED = tuple(dict.fromkeys(option.key for option in _FIELDS if option.has_wildcards))
"""Keys whose values may have wildcards. In this order, ``{1}``, ``{2}`` … number what the wildcards match."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry of ``jobs``, with the line of each key."""

    file: str
    line: int
    values: Mapping[str, Any]
    lines: Mapping[str, int]

    def error(self, key: str, sentence: str, hint: str = "") -> RequestError:
        """Return an error with the line of a key; of a key from ``defaults``, the line there."""
        return RequestError(self.file, self.lines.get(key, self.line), key, sentence, hint=hint)


def read_batch(path: str, overrides: Mapping[str, Any] | None = None) -> tuple[Job, ...]:
    """Return the jobs that a YAML file states, in its order.

    Args:
        path: the file. Paths in it are relative to the current directory, as on the command line.
        overrides: values of requests that win over the file's.

    Raises:
        RequestError: the file is not YAML, a key is unknown, repeated, missing or of the wrong type, a wildcard
            matches nothing, two jobs have one name or one output, or a job reads the output of another.
    """
    values, node = parse_yaml(path)
    lines = _lines(node)
    for key in values:
        if key not in _TOP_KEYS:
            raise RequestError(
                path, lines.get(key, 0), str(key), "unknown key for a batch", hint=close_hint(key, _TOP_KEYS)
            )
    defaults, own_lines = _defaults(path, values, node)
    entries = _entries(path, values, node, own_lines)
    jobs = []
    for entry in entries:
        for job in _jobs(entry, defaults, overrides or {}):
            jobs.append(job)
            # Checked while jobs are made, since an entry may expand to very many.
            if len(jobs) > MAX_JOBS:
                raise entry.error("jobs", f"the batch has more than {MAX_JOBS} jobs, counting this entry")
    _check_apart(path, jobs)
    return tuple(jobs)


def _defaults(
    path: str, values: Mapping[str, Any], node: yaml.MappingNode
) -> tuple[Mapping[str, Any], dict[str, int]]:
    """Return the table ``defaults``, and the line of each of its keys."""
    defaults = values.get("defaults")
    if defaults is None:
        return {}, {}
    if not isinstance(defaults, dict):
        sentence = f"is {shown(defaults)}, expected a table of keys"
        raise RequestError(path, _lines(node).get("defaults", 1), "defaults", sentence)
    lines = _lines(_node_of(node, "defaults"))
    for key in defaults:
        if key not in _MERGE_KEYS | _CONVERT_KEYS:
            hint = _OF_THE_BATCH.get(key) or close_hint(key, sorted(_MERGE_KEYS | _CONVERT_KEYS))
            raise RequestError(path, lines.get(key, 0), str(key), "unknown key for defaults", hint=hint)
    return defaults, lines


def _entries(
    path: str, values: Mapping[str, Any], node: yaml.MappingNode, lines: Mapping[str, int]
) -> Iterator[_Entry]:
    """Yield the entries of ``jobs``. ``lines`` has the lines of ``defaults``, for keys that an entry leaves out."""
    listed = values.get("jobs")
    if not isinstance(listed, list) or not listed:
        line = _lines(node).get("jobs", 1)
        raise RequestError(
            path,
            line,
            "jobs",
            f"is {shown(listed)}, expected a list of jobs",
            hint="write a list, one entry for each job: - adapter: …",
        )
    nodes = _node_of(node, "jobs").value
    for entry, where in zip(listed, nodes, strict=True):
        line = where.start_mark.line + 1
        if not isinstance(entry, dict):
            # A text is not repeated: it may be a token.
            what = "a text" if isinstance(entry, str) else shown(entry)
            raise RequestError(path, line, "jobs", f"a job is {what}, expected a table of keys")
        yield _Entry(path, line, entry, {**lines, **_lines(where)})


def _jobs(entry: _Entry, defaults: Mapping[str, Any], overrides: Mapping[str, Any]) -> Iterator[Job]:
    """Yield the jobs of one entry: one for each cell of its matrix and each match of its wildcards."""
    own = {key: value for key, value in entry.values.items() if key not in {"name", "matrix"}}
    matrix = entry.values.get("matrix")
    converts = "convert" in own or (isinstance(matrix, dict) and "convert" in matrix)
    # ``defaults`` may serve merges and conversions, so keys of the other kind are left out below.
    kind, kind_keys = ("conversion", _CONVERT_KEYS) if converts else ("merge", _MERGE_KEYS)
    for cell in _cells(entry):
        words = {key: str(value) for key, value in cell.items()}
        fields = {key: value for key, value in cell.items() if key in kind_keys | {"convert"}}
        wanted = {**{key: value for key, value in defaults.items() if key in kind_keys}, **own, **fields}
        # A word of the matrix has to be a key or to occur in a template; otherwise it is a typo.
        for word in words.keys() - fields.keys():
            if f"{{{word}}}" not in str({**own, "name": entry.values.get("name")}):
                sentence = f"{quoted(word)} is not a key of a {kind}, and no template uses {{{word}}}"
                raise entry.error("matrix", sentence, close_hint(word, sorted(kind_keys)))
        wanted |= {key: _worded(wanted[key], words) for key in _GLOBBED if key in wanted}
        for key in wanted:
            if key not in kind_keys | {"convert"}:
                hint = _OF_THE_BATCH.get(key) or close_hint(key, sorted(kind_keys | _OWN_KEYS))
                raise entry.error(str(key), f"unknown key for a {kind}", hint)
        for values, matched in _expanded(entry, wanted):
            yield _job(entry, {**values, **overrides}, {**matched, **words})


def _worded(value: Any, words: Mapping[str, str]) -> Any:
    """Return a value, or each item of a list, with the words of a matrix filled in: ``{word}``."""
    if isinstance(value, list):
        return [_worded(item, words) for item in value]
    for word, text in words.items():
        value = value.replace(f"{{{word}}}", text) if isinstance(value, str) else value
    return value


def _cells(entry: _Entry) -> Iterator[dict[str, Any]]:
    """Yield the cells of a matrix: one value of each key, in every combination; one empty cell without a matrix."""
    matrix = entry.values.get("matrix")
    if matrix is None:
        yield {}
        return
    if not isinstance(matrix, dict):
        raise entry.error("matrix", f"is {shown(matrix)}, expected a table of key → list of values")
    for key, values in matrix.items():
        if not isinstance(values, list) or not values:
            raise entry.error("matrix", f"has no list for {key}, expected a table of key → list of values")
    _check_count(entry, "matrix", [len(values) for values in matrix.values()])
    for values in product(*matrix.values()):
        yield dict(zip(matrix, values, strict=True))


def _check_count(entry: _Entry, key: str, counts: list[int]) -> None:
    """Raise an error if an entry expands to more jobs than a batch can have, before any of them is made."""
    if prod(counts) > MAX_JOBS:
        sentence = f"expands to {' × '.join(map(str, counts))} jobs, expected at most {MAX_JOBS}"
        raise entry.error(key, sentence)


def _expanded(entry: _Entry, values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Yield the values of a job with wildcards replaced, and what they matched: ``{"1": …}``."""
    patterns = {
        key: str(values[key])
        for key in _GLOBBED
        if isinstance(values.get(key), str) and _is_wild(values[key])
    }
    for key in _GLOBBED:
        if isinstance(values.get(key), list) and any(_is_wild(str(item)) for item in values[key]):
            raise entry.error(
                key,
                "a list cannot contain wildcards: all its adapters are merged into one output",
                "list each adapter, or give a single text with a wildcard",
            )
    found = {}
    for key, pattern in patterns.items():
        try:
            found[key] = matches(pattern, _placed(pattern))
        except ResolveError as exc:
            raise entry.error(key, str(exc), exc.hint) from exc
        if not found[key]:
            hint = "check the path and its wildcards"
            if is_store_url(pattern):
                hint = "write one job for each: wildcards match local directories only"
            raise entry.error(key, f"{pattern} matches no directory", hint)
    _check_count(entry, next(iter(found), ""), [len(places) for places in found.values()])
    for chosen in product(*found.values()):
        words = [word for _, captured in chosen for word in captured]
        paths = dict(zip(found, (path for path, _ in chosen), strict=True))
        yield {**values, **paths}, {str(n): word for n, word in enumerate(words, 1)}


def _is_wild(text: str) -> bool:
    """Return True for a path with wildcards, unless a file or directory has just that name."""
    return bool(WILD.search(text)) and not is_there(Path(text))


def _job(entry: _Entry, values: Mapping[str, Any], words: Mapping[str, str]) -> Job:
    """Return the job that some values state, with its templates filled in."""
    converts = "convert" in values
    adapters = values.get("convert", values.get("adapter", ()))
    listed = _listed(adapters)
    own = {
        # Words for templates, besides those of the matrix and of wildcards.
        "adapter": "+".join(_last(str(adapter)) for adapter in listed),
        "parent": PurePosixPath(str(listed[0]) if listed else "").parent.name,
        "base": _last(str(values.get("base") or "")),
    }
    known = {**words, **{field: word for field, word in own.items() if word}}
    filled = {
        key: _filled(entry, key, value, known) if key == "out" else value for key, value in values.items()
    }
    name = _filled(entry, "name", entry.values.get("name") or filled.get("out"), known)
    if not filled.get("out"):
        hint = "add out: PATH; {adapter}, {parent}, {base} and {1} are filled in"
        raise entry.error("out", "is missing", hint)
    try:
        request = _convert_request(filled) if converts else _merge_request(filled)
    except RequestError as exc:
        key = _SPELT.get(exc.key, exc.key) if converts else exc.key
        raise entry.error(key, exc.sentence, exc.hint) from exc
    if request.push_to_hub:
        hint = "run lora-merge convert with --push-to-hub" if converts else "write out: hf://ORG/NAME"
        raise entry.error("push_to_hub", "is given, and a batch does not push what is on this disk", hint)
    return Job(str(name), request, entry.line)


def _merge_request(values: Mapping[str, Any]) -> Request:
    if "adapter" not in values:
        raise RequestError(
            "",
            0,
            "adapter",
            "is missing",
            hint="add adapter: PATH to merge one, or convert: PATH to convert one",
        )
    # Resumes by default, so that a batch that is run again continues.
    return validated(Request, parse_values(Request, {"resume": True, **values}))


def _convert_request(values: Mapping[str, Any]) -> ConvertRequest:
    adapter = values["convert"]
    if not isinstance(adapter, str) or not adapter:
        raise RequestError(
            "", 0, "adapter", f"is {shown(adapter)}, expected one adapter: a directory or a repo"
        )
    named = {field: values[key] for field, key in _SPELT.items() if key in values}
    parsed = parse_request(ConvertRequest, named)
    return validated(ConvertRequest, {field: getattr(parsed, field) for field in _SPELT})


def _placed(text: str) -> str:
    """Return an adapter's path without its weight. Errors are left to the request's own parser."""
    try:
        return parse_adapter(text)[0]
    except ValueError:
        return text


def _listed(adapters: Any) -> list[Any]:
    """Return the adapters one by one. Errors are left to the request's own parser."""
    try:
        return list(adapter_texts(adapters))
    except ValueError:
        return adapters if isinstance(adapters, list) else [adapters]


def _last(path: str) -> str:
    """Return the last part of a path or a repo, without weight and revision.

    Example:
        >>> _last("runs/style/checkpoint-10:0.5"), _last("org/my-lora@v1")
        ('checkpoint-10', 'my-lora')
    """
    return PurePosixPath(_placed(path).partition("@")[0]).name


def _filled(entry: _Entry, key: str, template: Any, known: Mapping[str, str]) -> Any:
    """Return a template with its fields filled in; other values are returned unchanged.

    Raises:
        RequestError: it has an unknown field.
    """
    if not isinstance(template, str):
        return template

    def fill(match: re.Match[str]) -> str:
        if match[1] not in known:
            listed = ", ".join(f"{{{word}}}" for word in known)
            raise entry.error(key, f"unknown field {match[0]} in {quoted(template)}", f"use one of {listed}")
        return known[match[1]]

    return _FIELD.sub(fill, template)


def _check_apart(file: str, jobs: list[Job]) -> None:
    """Raise an error if two jobs have one name or overlapping outputs, or one reads what another writes."""
    names: dict[str, Job] = {}
    outs: dict[Path, Job] = {}
    above: dict[Path, Job] = {}
    """Directory → a job whose output is inside it."""

    for job in jobs:
        if job.name in names:
            sentence = f"two jobs are named {job.name} (the other is on line {names[job.name].line})"
            raise RequestError(
                file, job.line, "name", sentence, hint="make names differ, for example with {adapter} or {1}"
            )
        names[job.name] = job
        out = _path(file, job, "out", job.request.out)
        other = next((outs[path] for path in (out, *out.parents) if path in outs), None)
        # In both directions: an output inside another one, or around it.
        other = other or above.get(out)
        if other is not None:
            sentence = f"{job.request.out} overlaps the output of {other.name} (line {other.line})"
            raise RequestError(file, job.line, "out", sentence, hint="give each job a separate output")
        outs[out] = job
        above |= dict.fromkeys(out.parents, job)
    for job in jobs:
        for key, text in _inputs(job):
            path = _path(file, job, key, text)
            writer = next((outs[place] for place in (path, *path.parents) if place in outs), None)
            if writer is not None:
                sentence = f"{text} is the output of {writer.name} (line {writer.line})"
                raise RequestError(
                    file,
                    job.line,
                    key,
                    sentence,
                    hint="use one batch for each step: the jobs of a batch have no order",
                )


def _inputs(job: Job) -> Iterator[tuple[str, str]]:
    """Yield key and path of everything that a job reads."""
    match job.request:
        case Request(adapter=adapters):
            yield from (("adapter", _placed(adapter)) for adapter in adapters)
        case ConvertRequest(adapter=adapter):
            yield "convert", adapter
    if job.request.base:
        yield "base", job.request.base


def _path(file: str, job: Job, key: str, text: str) -> Path:
    """Return the resolved path of a directory that a job names, so that two spellings compare equal.

    Raises:
        RequestError: it cannot be a path.
    """
    try:
        return output_path(text)
    except ResolveError as exc:
        raise RequestError(file, job.line, key, str(exc), hint=exc.hint) from exc


def _node_of(node: yaml.MappingNode, name: str) -> Any:
    """Return the node of a key's value."""
    # The last one counts: what a merge key (``<<``) brings comes before the own keys.
    return next(value for key, value in reversed(node.value) if key.value == name)


def _lines(node: yaml.MappingNode) -> dict[str, int]:
    return {str(key.value): key.start_mark.line + 1 for key, _ in node.value}
