"""``lora-merge doctor``: versions, devices, disks, caches and engines, on one page for a bug report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_merge.cli import exits
from lora_merge.cli.help_pages import Verb
from lora_merge.cli.options import SETTINGS, options
from lora_merge.cli.voice import show, show_data
from lora_merge.redaction import fit
from lora_merge.words import counted, size_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_merge.diagnosis.facts import Diagnosis, Disk, Engine, Finding, Machine, Package, Torch


@click.command(cls=Verb, context_settings=SETTINGS)
@options("doctor")
def doctor(*, json: bool) -> None:
    """Check this machine, and print a page for a bug report.

    Lists versions, devices, memory, disks, caches and engines, then what to do about anything that is missing. Values of
    tokens are never shown. Nothing is downloaded.

    \b
    Examples:
      lora-merge doctor
      lora-merge doctor --json > doctor.json
    """
    # Not through the public functions: their modules may need what is missing.
    from lora_merge.diagnosis.run import diagnose

    diagnosis = diagnose()
    if json:
        show_data({"ok": diagnosis.can_merge, **asdict(diagnosis)})
    else:
        show("\n".join(_page(diagnosis)))
    click.get_current_context().exit(exits.OK if diagnosis.can_merge else exits.PLAN)


def _page(diagnosis: Diagnosis) -> Iterable[str]:
    machine = diagnosis.machine
    yield f"lora-merge {machine.version}"
    sections = {
        "Machine": _machine_rows(machine),
        "Packages": [_package_row(package) for package in machine.packages],
        "Disks": [(disk.name, _disk_text(disk)) for disk in machine.disks],
        "Caches": [
            (one.name, f"{counted(one.n_repos, 'repo')} in {_place(one.path)}") for one in machine.caches
        ],
        "Object stores": [(one.name, one.credentials or "no credentials found") for one in machine.stores],
        "Engines": [(one.name, _engine_text(one)) for one in machine.engines] or [("none found", "")],
        "Environment": [(one.name, _place(one.value)) for one in machine.variables],
    }
    for title, rows in sections.items():
        if rows:
            widest = max(len(name) for name, _ in rows)
            yield ""
            yield f"{title}:"
            yield from (f"  {name.ljust(widest)}  {fit(text)}".rstrip() for name, text in rows)
    yield ""
    for finding in diagnosis.findings:
        yield from _finding_lines(finding)


def _machine_rows(machine: Machine) -> list[tuple[str, str]]:
    rows = [
        ("Python", f"{machine.python}, {_place(machine.executable)}"),
        ("platform", machine.platform),
        ("processor", f"{counted(machine.n_cores, 'usable core')}"),
    ]
    if machine.memory_free_bytes is not None:
        total = f" of {size_text(machine.memory_total_bytes)}" if machine.memory_total_bytes else ""
        rows.append(("memory", f"{size_text(machine.memory_free_bytes)} free{total}"))
    rows.append(("torch", _torch_text(machine.torch)))
    rows.append(("loops", _loops_text(machine.loops)))
    for n, gpu in enumerate(machine.torch.gpus):
        rows.append(
            (f"GPU {n}", f"{gpu.name}, {size_text(gpu.memory_bytes)}, compute capability {gpu.capability}")
        )
    return rows


def _loops_text(vectors: str) -> str:
    if vectors:
        return f"compiled, {vectors}"
    return "not compiled: quantised merges are several times slower"


def _torch_text(torch: Torch) -> str:
    return (
        f"cannot be imported: {torch.problem}"
        if torch.problem
        else f"{torch.version}, built for {torch.build}"
    )


def _package_row(package: Package) -> tuple[str, str]:
    if package.is_missing:
        return package.name, f"not installed; needed for {package.purpose}"
    return package.name, package.version + (
        f" (too old, expected {package.oldest})" if package.is_too_old else ""
    )


def _disk_text(disk: Disk) -> str:
    traits = [disk.filesystem, "" if disk.is_writable else "not writable"]
    if disk.has_reflinks is not None:
        traits.append("reflinks" if disk.has_reflinks else "no reflinks")
    listed = ", ".join(filter(None, traits))
    sizes = f"{size_text(disk.free_bytes)} free of {size_text(disk.total_bytes)}"
    return f"{sizes}{f' ({listed})' if listed else ''}, {_place(disk.path)}"


def _engine_text(engine: Engine) -> str:
    return _place(engine.place) if engine.place else f"{engine.version}, in this environment"


def _place(text: str) -> str:
    """Return a path without the user's name, where it is below the home directory."""
    home = str(Path("~").expanduser())
    is_below = home not in {"/", "~"} and (text == home or text.startswith(f"{home}/"))
    return f"~{text[len(home) :]}" if is_below else text


def _finding_lines(finding: Finding) -> Iterable[str]:
    yield f"{finding.severity}: {fit(finding.sentence)}"
    if finding.hint:
        yield f"hint: {fit(finding.hint)}"
