"""Draw what the program shows on a terminal: real runs on small real models, as PNG in docs/pictures/.

Each scene runs in a pseudo-terminal of 80 x 24 or 140 x 40 characters; what is longer has a taller one, to be seen as a whole. Times, rates and free disk space are those of the
machine that drew the pictures.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from picturing.drawing import draw
from picturing.terminal import Screen, Session, record
from picturing.workshop import PROGRAM, ROOT, build, environ

from lora_merge.cli.next_steps import continued

PICTURES = ROOT / "docs" / "pictures"
OUTPUTS = ("dora", "merged", "both", "out", "extracted", "style-16")
"""What the scenes write. They begin without it."""

SMALL, LARGE, TALL = (80, 24), (140, 40), (80, 64)


def last(session: Session) -> Screen:
    """Return the screen at the end."""
    return session.frames[-1]


def midway(session: Session) -> Screen:
    """Return the screen when the bar of the merge was about half full."""
    shares = [_share(frame) for frame in session.frames]
    return session.frames[min(range(len(shares)), key=lambda n: abs(shares[n] - 0.6))]


def _share(frame: Screen) -> float:
    """Return the part of the bar on a screen that is full; 9 where there is no bar with all of its numbers."""
    bar = next((line for line in frame.lines if "━" in line and " left" in line), "")
    return bar.count("━") / (bar.count("━") + bar.count("─")) if bar else 9.0


def damage(root: Path) -> None:
    """Flip one bit of a merged weight."""
    file = root / "merged" / "model.safetensors"
    file = file if file.exists() else min((root / "merged").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1000] ^= 64
    file.write_bytes(content)


@dataclass(frozen=True)
class Scene:
    """One picture."""

    name: str
    line: str
    """The command as it is typed."""

    status: int = 0
    moment: Callable[[Session], Screen] = last
    size: tuple[int, int] = SMALL
    before: Callable[[Path], None] | None = None
    """What happens to the workshop first."""


SCENES = (
    Scene("merge-running", "lora-merge --base base --adapter my-dora --out dora", moment=midway),
    Scene("merge-end", "lora-merge --base base --adapter my-lora --out merged"),
    Scene("dry-run", "lora-merge --base base --adapter my-lora --out merged-2 --dry-run"),
    Scene(
        "dry-run-ties",
        "lora-merge --base base --adapter style:0.7 --adapter facts --combine ties --out both --dry-run",
    ),
    Scene("plan-error", "lora-merge --base base --adapter small-lora --out wrong", status=4),
    Scene(
        "warning",
        "lora-merge --base base --adapter style --adapter facts --density 0.3 --out both",
    ),
    Scene("inspect", "lora-merge inspect my-lora --engine vllm"),
    Scene("verify-ok", "lora-merge verify merged"),
    Scene("verify-failed", "lora-merge verify merged", status=6, before=damage),
    Scene("batch-running", "lora-merge batch batch.yaml", moment=midway),
    Scene("batch-end", "lora-merge batch mixed.yaml --keep-going", status=7),
    Scene("extract", "lora-merge extract --base base --tuned finetuned --rank 16 --out extracted"),
    Scene("convert", "lora-merge convert style --for vllm --rank 16 --out style-16"),
    Scene("quantised-base", "lora-merge plan --base base-fp8 --adapter style", size=TALL),
    Scene("synonym", "lora-merge --model base --lora-path my-lora --output_dir merged-3", status=2),
    Scene("not-found", "lora-merge --base base --adapter my-lroa --out merged-3", status=3),
    Scene("survival", "lora-merge plan --base base --adapter my-lora --survival", size=LARGE),
    Scene("help", "lora-merge --help", size=TALL),
    Scene("inspect-wide", "lora-merge inspect my-lora --base base", size=LARGE),
)


def take(scene: Scene, root: Path) -> Screen:
    """Run a scene in the workshop and return its screen.

    Raises:
        SystemExit: the command ended with another status than the scene has.
    """
    if scene.before is not None:
        scene.before(root)
    words = shlex.split(scene.line)[1:]
    columns, rows = scene.size
    typed = "\r\n".join(continued(scene.line, columns - 2)).strip()
    session = record([*PROGRAM, *words], columns=columns, rows=rows, cwd=root, typed=typed, environ=environ())
    if session.status != scene.status:
        sys.exit(f"{scene.name}: status {session.status}, expected {scene.status}\n{session.frames[-1].text}")
    screen = scene.moment(session)
    if str(root) in screen.text.replace("\n", ""):
        sys.exit(f"{scene.name}: shows the directory of the workshop\n{screen.text}")
    return screen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="write the pictures; otherwise print the screens"
    )
    parser.add_argument("--only", help="names of scenes, separated by commas")
    parser.add_argument("--workshop", type=Path, help="keep the models here, and use them again")
    arguments = parser.parse_args()
    wanted = None if arguments.only is None else set(arguments.only.split(","))
    with tempfile.TemporaryDirectory() as scratch:
        root = (arguments.workshop or Path(scratch, "workshop")).resolve()
        if not (root / "mixed.yaml").exists():
            root.mkdir(parents=True, exist_ok=True)
            build(root)
        for name in OUTPUTS:
            shutil.rmtree(root / name, ignore_errors=True)
        for scene in SCENES:
            if wanted is not None and scene.name not in wanted:
                continue
            screen = take(scene, root)
            if arguments.write:
                draw(screen, PICTURES / f"{scene.name}.png")
                print(f"{scene.name}.png")
            else:
                print(screen.text, end="\n\n")


if __name__ == "__main__":
    main()
