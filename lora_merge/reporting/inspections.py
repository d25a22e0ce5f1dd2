"""The page of an inspection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.peft_rules.method_names import method_name
from lora_merge.reporting.blocks import notices, with_warnings, worst
from lora_merge.reporting.data import inspection_data
from lora_merge.reporting.maps import kinds_table, points_of_modules, rank_chart, size_chart
from lora_merge.reporting.names import dtype, methods_text
from lora_merge.reporting.page import Command, Fact, Facts, Mark, Page, State, Table, section, sections
from lora_merge.words import counted, size_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.inspection.facts import Inspection
    from lora_merge.serving.engine_report import EngineReport


def inspection_page(found: Inspection, command: str) -> Page:
    """Return the page of an inspection."""
    points = points_of_modules(found.modules)
    ok = not any(issue.severity == "error" for issue in found.issues)
    state, verdict = _verdict(found)
    return Page(
        kind="Adapter",
        headline=_headline(found),
        state=state,
        verdict=verdict,
        figures=_figures(found),
        sections=sections(
            section("messages", "Messages", notices(found.issues)),
            section("engines", "Which engines serve it as it is", _engines(found.engines)),
            section("size", "How large the changes are", size_chart(points, "map-size")),
            section("modules", "Modules", rank_chart(points, "map-rank"), kinds_table(points)),
            section("adapter", "The adapter", Facts(tuple(_facts(found)))),
            section("provenance", "Provenance", Facts(tuple(_origin(found)))),
            section("command", "Command", Command(command) if command else None),
        ),
        data={"ok": ok, **inspection_data(found)},
    )


def _headline(found: Inspection) -> str:
    kinds = dict.fromkeys(one.kind for one in found.modules)
    change = methods_text(kinds or [found.kind], map(str, found.rank_counts))
    return f"{change} for {found.base}" if found.base else change


def _verdict(found: Inspection) -> tuple[State, str]:
    state, warned = worst(found.issues), with_warnings(found.issues)
    if state == "bad":
        return state, "This adapter cannot be merged as it is. The messages say why."
    against = "It fits its base" if found.with_base else "Read without a base"
    return ("plain" if state == "good" and not found.with_base else state), f"{against}{warned}."


def _figures(found: Inspection) -> tuple[Fact, ...]:
    n_serving = sum(one.verdict.startswith("yes") for one in found.engines)
    return (
        Fact("modules", str(len(found.modules))),
        *([Fact("rank", _counts(found))] if found.rank_counts else []),
        Fact("size", size_text(found.nbytes)),
        *([Fact("engines that serve it", f"{n_serving} of {len(found.engines)}")] if found.engines else []),
    )


def _counts(found: Inspection) -> str:
    ranks = sorted(found.rank_counts)
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"


def _facts(found: Inspection) -> list[Fact]:
    storages = "; ".join(f"{count} as {dtype(words)}" for words, count in found.storages.items())
    rows = [
        Fact("adapter", found.adapter, is_code=True),
        Fact("method", f"{method_name(found.kind)} ({found.format} format)"),
        Fact("base", found.base, is_code=True),
        Fact("base's weights", storages),
        Fact("targets", found.targets),
        Fact("modules", counted(len(found.modules), "module")),
        Fact("ranks", ", ".join(f"{rank} × {count}" for rank, count in found.rank_counts.items())),
        *(Fact(name, value) for name, value in found.settings.items()),
    ]
    return [row for row in rows if row.value]


def _origin(found: Inspection) -> list[Fact]:
    rows = [
        Fact("trained by", found.framework),
        *(Fact(name, value) for name, value in found.provenance.items()),
        Fact("digest", found.digest, is_code=True),
        Fact("files", ", ".join(found.files)),
    ]
    return [row for row in rows if row.value]


def _engines(engines: Sequence[EngineReport]) -> Table:
    rows = tuple(
        (
            Mark(one.verdict, _state(one.verdict)),
            f"{one.engine} {one.version}",
            tuple(obstacle.sentence for obstacle in one.obstacles),
            one.cures,
        )
        for one in engines
    )
    return Table(
        "Engines", ("Serves it", "Engine", "Why not", "What helps"), rows, code=frozenset({3}), is_titled=True
    )


def _state(verdict: str) -> State:
    return "good" if verdict.startswith("yes") else "bad" if verdict == "no" else "warn"
