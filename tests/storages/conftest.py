"""The option that names the oracles' interpreter, and what several tests of storages need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.storages.reference import FIXTURES, adapted, beside, by_library, everywhere, model_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

collect_ignore = ["making"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option. It is known where these tests are named on the command line, as ``make oracles`` does."""
    parser.addoption(
        "--oracles-python",
        metavar="PATH",
        help="An interpreter with the libraries that write quantised checkpoints.",
    )


@pytest.fixture(scope="session")
def oracles_python(pytestconfig: pytest.Config) -> Path:
    """Return the interpreter of the oracles' environment."""
    given = pytestconfig.getoption("--oracles-python", None)
    if given is None:
        pytest.skip("needs --oracles-python, an interpreter with the libraries that quantise: make oracles")
    return Path(given).absolute()


class Case(NamedTuple):
    """A fixture with an adapter for it."""

    base: Path
    adapter: Path
    logits: torch.Tensor
    """Of the base as its library decodes it, with the adapter that is not merged."""


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """Return a function: fixture, and fields of the adapter → both, and what they compute. All linear layers by default."""
    found: dict[str, Case] = {}

    def build(name: str, **fields: Any) -> Case:
        fields = fields or everywhere(name)
        key = f"{name} {sorted(fields.items())}"
        if key not in found:
            root = tmp_path_factory.mktemp(name)
            model = model_of(by_library(name), FIXTURES / name, root / "dense")
            logits = adapted(model, root / "adapter", **fields)
            found[key] = Case(FIXTURES / name, root / "adapter", logits)
        return found[key]

    return build


@pytest.fixture(scope="session")
def norms_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Return a function: fixture → with an adapter that changes the last norm alone."""

    def build(name: str) -> Case:
        import torch
        from peft import LNTuningConfig, get_peft_model

        root = tmp_path_factory.mktemp(name)
        model = get_peft_model(
            model_of(by_library(name), FIXTURES / name, root / "dense"),
            LNTuningConfig(target_modules=["model.norm"]),
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.25)
        model.save_pretrained(root / "adapter")
        from tests.storages.reference import logits_of

        return Case(FIXTURES / name, root / "adapter", logits_of(model.eval()))

    return build


@pytest.fixture
def dense_case(case: Callable[..., Case], norms_case: Callable[[str], Case]) -> Callable[[str], Case]:
    """Return a function: fixture → with an adapter on what is not quantised."""

    def build(name: str) -> Case:
        fields = beside(name)
        return case(name, **fields) if fields else norms_case(name)

    return build
