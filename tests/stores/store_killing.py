"""Kill merges into a store at operations drawn at random, run them again, and compare: prints what it found.

Each run is a fork. The store is used in forks alone: its library has threads, which a fork would lose.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge.storage.objects import parse_store_url
from tests.faults.trial import content, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lora_merge.storage.objects import StoreUrl

COMPLETE = "is complete, and was made from the same"

CHANGING = ("put", "delete")
"""Operations that change a store, beside those of large files."""


class Strikes:
    """Counts operations, and ends this process in front of one of them."""

    def __init__(self, at: int | None) -> None:
        self._at, self._count, self._lock = at, itertools.count(), threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            if next(self._count) == self._at:
                os.kill(os.getpid(), signal.SIGKILL)

    @property
    def calls(self) -> int:
        return next(self._count)


class Struck:
    """A store whose operations may each be the last."""

    def __init__(self, store: Any, strike: Callable[[], None]) -> None:
        self._store, self._strike = store, strike

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in CHANGING:
            return found

        def struck(*arguments: Any, **named: Any) -> Any:
            self._strike()
            return found(*arguments, **named)

        return struck

    @contextlib.contextmanager
    def file(self, name: str, nbytes: int) -> Iterator[Any]:
        self._strike()
        with self._store.file(name, nbytes) as sink:
            write = sink.write

            def struck(block: memoryview) -> None:
                self._strike()
                write(block)

            sink.write = struck
            yield sink
            self._strike()
        self._strike()


def armed(at: int | None) -> Callable[[], int]:
    """Let every operation of this process count; the result says how many there were."""
    from lora_merge.storage import store_output, store_staging

    strikes = Strikes(at)
    for module in (store_output, store_staging):
        real = module.store_at
        setattr(module, "store_at", lambda url, real=real: Struck(real(url), strikes))  # noqa: B010
    return lambda: strikes.calls


class Directory:
    """Where outputs go with ``file://``: a directory of this machine."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def now(self) -> dict[str, str]:
        """Return a digest of every object of the output."""
        out = self._root / "out"
        return content(out) if out.is_dir() else {}

    def clear(self, old: str | None) -> None:
        """Remove everything, and put an older output there, if there is to be one."""
        for path in list(self._root.iterdir()):
            shutil.rmtree(path)
        if old:
            shutil.copytree(old, self._root / "out")

    def left(self) -> list[str]:
        """Return what is there beside the output."""
        return sorted(path.name for path in self._root.iterdir() if path.name != "out")


class Bucket:
    """Where outputs go with ``s3://``: a folder of a bucket, which boto3 looks at without threads, for the forks' sake."""

    def __init__(self, url: StoreUrl) -> None:
        from tests.stores.conftest import client

        self._client, self._prefix = client(os.environ["AWS_ENDPOINT_URL"]), f"{url.prefix}/"
        self._bucket = {"Bucket": url.bucket}

    def now(self) -> dict[str, str]:
        """Return a digest of every object of the output."""
        return {
            key.removeprefix("out/"): hashlib.sha256(self._bytes_of(key)).hexdigest()
            for key in self._keys()
            if key.startswith("out/")
        }

    def clear(self, old: str | None) -> None:
        """Remove everything, and put an older output there, if there is to be one."""
        for key in self._keys():
            self._client.delete_object(**self._bucket, Key=self._prefix + key)
        for path in sorted(Path(old).iterdir()) if old else ():
            key = f"{self._prefix}out/{path.name}"
            self._client.put_object(**self._bucket, Key=key, Body=path.read_bytes())

    def left(self) -> list[str]:
        """Return what is there beside the output, uploads that nobody finished among it."""
        uploads = self._client.list_multipart_uploads(**self._bucket, Prefix=self._prefix).get("Uploads", ())
        beside = [key for key in self._keys() if not key.startswith("out/")]
        return sorted([*beside, *(f"upload of {upload['Key']}" for upload in uploads)])

    def _keys(self) -> list[str]:
        found = self._client.list_objects_v2(**self._bucket, Prefix=self._prefix).get("Contents", ())
        return [one["Key"].removeprefix(self._prefix) for one in found]

    def _bytes_of(self, key: str) -> bytes:
        answer = self._client.get_object(**self._bucket, Key=self._prefix + key)
        return bytes(answer["Body"].read())


class Killing:
    """Many ends of one merge into a store.

    Args:
        told: what `main` is told.
    """

    def __init__(self, told: dict[str, Any]) -> None:
        url = parse_store_url(told["work"])
        self._place = Directory(Path(told["work"])) if url is None else Bucket(url)
        self._arguments = list(told["arguments"])
        self._old, self._whole = told["old"], told["whole"]
        self._draw = random.Random(told["seed"])
        self.n_last = told["n_last"]
        self.clear()
        whole = run([*self._arguments, *self._over], lambda: armed(None))
        if whole.code or self.now() != self._whole:
            raise SystemExit(
                f"the merge itself fails: {whole.text} {set(self.now().items()) ^ set(self._whole.items())}"
            )
        self._calls = whole.calls

    @property
    def _over(self) -> list[str]:
        return ["--overwrite"] if self._old else []

    def now(self) -> dict[str, str]:
        """Return a digest of every object of the output."""
        return self._place.now()

    def clear(self) -> None:
        """Put everything back to where a merge begins."""
        self._place.clear(self._old)

    def once(self) -> Iterator[str]:
        """Kill one run, perhaps the next one too, then let it go on; yield a word for each thing that happened."""
        self.clear()
        old = self.now()
        over = self._over
        for n in range(1 + (self._draw.random() < 0.4)):
            last = self._calls - self.n_last if self.n_last else 0
            at = self._draw.randrange(max(last, 0), self._calls)
            resume = ["--resume"] if n else []
            ended = run([*self._arguments, *over, *resume], lambda at=at: armed(at))
            yield from self._look(old)
            if COMPLETE in ended.text:
                break
            yield {137: "killed", 0: "ended"}.get(ended.code) or self.wrong(ended)
        done = run([*self._arguments, *over, "--resume"], lambda: armed(None))
        if self.now() != self._whole or (done.code and COMPLETE not in done.text):
            yield self.wrong(done)
        elif left := self._place.left():
            yield f"broken: left {left}"
        else:
            yield "resumed"
        if "had already written" in done.text:
            yield "from where it stopped"

    def wrong(self, ended: Any) -> str:
        """Return what went wrong, for the reader of the test."""
        return f"broken: {ended.code}: {ended.text[-600:]}"

    def _look(self, old: dict[str, str]) -> Iterator[str]:
        """Yield a word where there is a ``config.json`` beside anything but a whole output, old or new."""
        now = self.now()
        if "config.json" not in now:
            yield "no config"
            return
        is_new = {name: now.get(name) for name in self._whole} == self._whole
        is_old = bool(old) and {name: now.get(name) for name in old} == old
        yield (
            "new config"
            if is_new
            else "old config"
            if is_old
            else f"broken: config.json beside {sorted(now)}"
        )


def main() -> None:
    """Carry out what the first argument says, and print how often each thing happened."""
    told = json.loads(sys.argv[1])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import obstore  # noqa: F401 - imported once for all forks; its threads begin with the first store
    import tokenizers  # noqa: F401
    import torch
    import xxhash  # noqa: F401

    import lora_merge.api
    import lora_merge.cli.merge  # noqa: F401

    torch.set_num_threads(1)
    killing = Killing(told)
    words = [word for _ in range(told["n"]) for word in killing.once()]
    sys.stdout.write(json.dumps({word: words.count(word) for word in sorted(set(words))}))


if __name__ == "__main__":
    main()
