"""The oracle: what PEFT and transformers make of the same base and adapter."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from lora_merge import executors
from lora_merge.merging.worker import CopySpec, MergeSpec
from tests.parity import elsewhere

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROMPT = [[1, 17, 5, 80, 33, 9, 62, 2], [1, 94, 3, 3, 41, 28, 70, 11]]


class Stored(NamedTuple):
    """A tensor as it stands in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    raw: bytes


@pytest.fixture(scope="session")
def second_process() -> Iterator[elsewhere.SecondProcess]:
    """A process that does the pieces of merges, one merge at a time."""
    with pytest.MonkeyPatch.context() as patch, elsewhere.second_process() as process:
        patch.syspath_prepend(Path(__file__).parents[2])
        yield process


@pytest.fixture(autouse=True)
def everything_travels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have every merge of the suite done in another process, unless the test names an executor.

    A test that patches something keeps its work here, where the patch is: what its workers are made from, what they are
    given and what they give back is used as it comes out of a pickle.
    """
    # Asked for by the test itself: what other fixtures patch is no business of the workers.
    stays = "monkeypatch" in inspect.signature(request.function).parameters
    real = executors.pick

    def pick(
        n_workers: int, device: str = "cpu", name: str = "auto", demand: Any = None, pace: Any = None
    ) -> executors.Executor:
        run = real(n_workers, device, name, demand, pace)

        def travelled(spec: Any, pieces: Any, n: int) -> Any:
            if name != "auto" or not isinstance(spec, CopySpec | MergeSpec):
                yield from run(spec, pieces, n)
            elif stays:
                for done in run(elsewhere.copied(spec), elsewhere.copied(list(pieces)), n):
                    yield elsewhere.copied(done)
            else:
                yield from request.getfixturevalue("second_process")(spec, pieces)

        return travelled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executors, "pick", pick)
        yield


@pytest.fixture(scope="session")
def stored() -> Callable[[Path], dict[str, Stored]]:
    """Return a function that reads every tensor of a directory, parsing the format by itself."""

    def read(root: Path) -> dict[str, Stored]:
        tensors: dict[str, Stored] = {}
        for path in sorted(root.glob("*.safetensors")):
            content = path.read_bytes()
            data = 8 + int.from_bytes(content[:8], "little")
            header = json.loads(content[8:data])
            header.pop("__metadata__", None)
            for name, row in header.items():
                begin, end = row["data_offsets"]
                raw = content[data + begin : data + end]
                tensors[name] = Stored(row["dtype"], tuple(row["shape"]), raw)
        return tensors

    return read


@pytest.fixture
def merged(cli, tmp_path) -> Callable[..., Path]:
    """Return a function (base, adapter, *options) → directory that the real command wrote."""

    def merge(base: Path, adapter: Path, *options: object) -> Path:
        out = tmp_path / "merged"
        result = cli("--base", base, "--adapter", adapter, "--out", out, *options)
        assert result.exit_code == 0, result.output
        return out

    return merge


@pytest.fixture(scope="session")
def load() -> Callable[..., Any]:
    """Return a function that loads a model in transformers, in the dtype of its checkpoint by default."""
    from transformers import AutoModelForCausalLM

    def load_model(root: Path, dtype: str = "auto") -> Any:
        return AutoModelForCausalLM.from_pretrained(root, dtype=dtype).eval()

    return load_model


class PeftMerge(NamedTuple):
    """What PEFT's own merge gives."""

    root: Path
    """Where ``save_pretrained`` put it."""

    touched: frozenset[str]
    """Weights of the modules that PEFT adapted."""


@pytest.fixture
def peft_merge(load, tmp_path) -> Callable[..., PeftMerge]:
    """Return a function (base, adapter, dtype) → the checkpoint of PEFT's default merge."""
    from peft import PeftModel

    def merge(base: Path, adapter: Path, dtype: str = "auto") -> PeftMerge:
        model = PeftModel.from_pretrained(load(base, dtype), adapter)
        touched = frozenset(f"{module}.weight" for module in model.targeted_module_names)
        model.merge_and_unload().save_pretrained(tmp_path / "by-peft")
        return PeftMerge(tmp_path / "by-peft", touched)

    return merge


@pytest.fixture(scope="session")
def logits() -> Callable[[Any], Any]:
    """Return a function that runs two fixed prompts through a model."""
    import torch

    def run(model: Any) -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # the products are tiny: handing them to threads takes longer
        try:
            with torch.no_grad():
                return model.eval()(torch.tensor(PROMPT)).logits
        finally:
            torch.set_num_threads(before)

    return run


class Results(NamedTuple):
    """One merge, by the command and by PEFT, tensor by tensor."""

    ours: dict[str, Stored]
    by_peft: dict[str, Stored]
    touched: frozenset[str]


@pytest.fixture
def results(merged, peft_merge, stored) -> Callable[[Path, Path], Results]:
    """Return a function (base, adapter) → what both make of them."""

    def merge(base: Path, adapter: Path) -> Results:
        by_peft = peft_merge(base, adapter)
        return Results(stored(merged(base, adapter)), stored(by_peft.root), by_peft.touched)

    return merge
