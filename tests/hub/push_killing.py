"""Kill pushes to the hub of the tests at moments drawn at random, continue them, and compare: prints what it found.

Each run is a fork. The hub is a process of its own, and this one speaks to it without huggingface_hub: forks would share its
connections.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.faults.trial import content, run
from tests.hub.taking import WRITE_TOKEN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.faults.trial import Ended

REPO = "me/merged"
COMPLETE = "is complete, and was made from the same"
TWICE = 0.4
"""How often the second run is killed, too."""
LATE = 0.3
"""How many kills come in the last fifth of a run, where the small files are committed and the pull request is merged."""


@contextlib.contextmanager
def served(root: Path) -> Iterator[str]:
    """Serve a hub that keeps everything in a directory; yield its address."""
    command = [sys.executable, "-m", "tests.hub.uploads", "--root", str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


class Killing:
    """Many ends of one push.

    Args:
        told: what `main` is told.
        url: of the hub.
    """

    def __init__(self, told: dict[str, Any], url: str) -> None:
        self._url, self._hub, self._hf = url, Path(told["hub"]), Path(os.environ["HF_HOME"])
        self._spool, self._whole = Path(os.environ["TMPDIR"]), told["whole"]
        self._arguments = [*told["arguments"], *(("--out", told["out"]) if told["out"] else ())]
        self._out = Path(told["out"]) if told["out"] else None
        self._draw = random.Random(told["seed"])
        for _ in range(2):  # the first one is slow
            self.clear()
            done = run([*self._arguments, "--push-to-hub", REPO])
            if done.code or self.now() != self._whole:
                raise SystemExit(f"the push itself fails: {done.text} {self.now()}")
        self._seconds = done.seconds

    def _ask(self, path: str, method: str = "GET", table: Any = None) -> Any:
        """Ask the hub."""
        body = None if table is None else json.dumps(table).encode()
        headers = {"Authorization": f"Bearer {WRITE_TOKEN}", "Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, body, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def now(self) -> dict[str, str]:
        """Return name → SHA-256 of the files of the branch, without the one that each repo has."""
        repo = self._ask("/_test/state")["repos"].get(REPO)
        files = repo["refs"]["main"] if repo else {}
        return {name: digest for name, digest in files.items() if name != ".gitattributes"}

    def clear(self) -> None:
        """Remove the repo, every byte that the hub has of it, what hf_xet remembers, and the directory."""
        if REPO in self._ask("/_test/state")["repos"]:
            owner, name = REPO.split("/")
            self._ask("/api/repos/delete", "DELETE", {"organization": owner, "name": name})
        folders = [self._hub / "blobs", self._hub / "arrived", self._hub / "cas", self._hf / "xet"]
        for folder in [*folders, *([self._out] if self._out else [])]:
            shutil.rmtree(folder, ignore_errors=True)
        for folder in folders:
            folder.mkdir()

    def once(self) -> Iterator[str]:
        """Kill one run, perhaps the next one too, then let it go on; yield a word for each thing that happened."""
        self.clear()
        for n in range(1 + (self._draw.random() < TWICE)):
            first = 0.8 if self._draw.random() < LATE else 0.0
            after = self._seconds * self._draw.uniform(first, 1.0)
            ended = run(self._again(n), kill_after=max(after, 0.001))
            yield from self._look()
            if COMPLETE in ended.text:
                break
            if not n and not ended.code:  # the machine has become faster
                self._seconds = min(self._seconds, ended.seconds)
            yield {137: "killed", 0: "ended"}.get(ended.code) or wrong("the run", ended)
        done = run(self._again(1))
        if self.now() != self._whole or (done.code and COMPLETE not in done.text):
            yield wrong("the run that went on", done)
        elif self._out and content(self._out) != self._whole:
            yield f"broken: the directory has {sorted(content(self._out))}"
        elif left := [path.name for path in self._spool.iterdir()]:
            yield f"broken: left in the spool's folder: {left}"
        else:
            yield "resumed"
        if "had already written" in done.text:
            yield "from where it stopped"
        statuses = [
            one["status"] for one in self._ask("/_test/state")["repos"][REPO]["pull_requests"].values()
        ]
        if "open" in statuses:
            yield "a pull request is open"

    def _again(self, n: int) -> list[str]:
        return [*self._arguments, "--push-to-hub", REPO, *(["--resume"] if n else [])]

    def _look(self) -> Iterator[str]:
        """Yield a word for what the branch has."""
        now = self.now()
        yield (
            "nothing on the branch"
            if not now
            else "all on the branch"
            if now == self._whole
            else f"broken: the branch has {sorted(now)}"
        )


def wrong(what: str, ended: Ended) -> str:
    """Return what went wrong, for the reader of the test."""
    return f"broken: {what} ended with {ended.code}: {ended.text[-1500:]}"


def main() -> None:
    """Carry out what the first argument says, and print how often each thing happened."""
    told = json.loads(sys.argv[1])
    with served(Path(told["hub"])) as url:
        os.environ["HF_ENDPOINT"] = url
        import tokenizers  # noqa: F401
        import torch
        import xxhash  # noqa: F401

        import lora_merge.api
        import lora_merge.cli.merge  # noqa: F401 - and nothing is imported in a fork
        from lora_merge.storage.hub.uploads import pull_request

        torch.set_num_threads(1)
        pull_request.COMMIT_SECONDS = 0.0  # a commit for each file
        killing = Killing(told, url)
        words = [word for _ in range(told["n"]) for word in killing.once()]
        found = {word: words.count(word) for word in sorted(set(words))}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
