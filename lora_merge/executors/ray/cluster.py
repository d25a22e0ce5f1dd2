"""The connection to a Ray cluster: one for a process, kept while a run or a batch needs it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import threading
from typing import TYPE_CHECKING, Any, Final

from lora_merge.errors import RequestError
from lora_merge.executors.ray.address import AUTO, LOCAL, host_and_port, parse_address
from lora_merge.runtime import machine
from lora_merge.runtime.packages import require

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_VARIABLE: Final = "RAY_ADDRESS"

_STORE_BYTES: Final = 100_000_000
"""The object store of a cluster for one run. Only what names work and results travels, never a tensor."""

_ANSWER_SECONDS: Final = 5.0
"""How long a cluster may take to answer a first connection. Ray itself waits for minutes, and then ends the process."""

_VERSIONS = re.compile(r"Ray: (\S+)\s+Python: (\S+)")
_START = "start one with `ray start --head`, or pass --ray-address local, which starts one on this machine for the run"
_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Link:
    """The connection of this process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.n_holders = 0
        self.address = ""
        """As it was asked for; empty where this process has none, or the program that calls us has made it."""


_LINK = _Link()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Keep the connection that is made inside for the whole block, and close it at the end of the outermost one."""
    with _LINK.lock:
        _LINK.n_holders += 1
    try:
        yield
    finally:
        with _LINK.lock:
            _LINK.n_holders -= 1
            if not _LINK.n_holders and _LINK.address:
                _disconnect()


def stay() -> None:
    """Keep the connection until this process ends, which ends it too."""
    with _LINK.lock:
        _LINK.n_holders += 1


def connect(address: str) -> int:
    """Connect to a cluster, unless this process is connected to it; return the number of CPUs of its nodes.

    A program that has called ``ray.init`` itself keeps its connection, whatever the address.

    Args:
        address: ``auto``, ``local`` or ``HOST:PORT``.

    Raises:
        PackageError: Ray is not installed.
        RequestError: there is no such cluster, it does not answer, or it has other versions.
    """
    ray = require("ray", "--executor ray")
    with _LINK.lock:
        if not ray.is_initialized():
            _init(ray, address)
            _LINK.address = address
        elif _LINK.address not in {"", address}:
            sentence = f"is {address}, but this process is connected to {_LINK.address}"
            raise _error(sentence, "use one cluster for all jobs")
    return int(ray.cluster_resources().get("CPU", 0))


def address_for_children(address: str) -> str:
    """Return the address with which other processes of this machine reach the same cluster.

    Args:
        address: as the user gave it; a cluster that was started for this run has another one.
    """
    if address != LOCAL or _LINK.address != LOCAL:
        return address
    ray = require("ray", "--executor ray")
    return str(ray.get_runtime_context().gcs_address)


def answers(ray: Any) -> bool:
    """Return True where the cluster of this process still takes connections."""
    try:
        with socket.create_connection(host_and_port(ray.get_runtime_context().gcs_address), _ANSWER_SECONDS):
            return True
    except OSError:
        return False


def _init(ray: Any, address: str) -> None:
    """Connect.

    Raises:
        RequestError: it failed.
    """
    options: dict[str, Any] = {"address": _reachable(address)}
    if options["address"] == LOCAL:
        options |= {
            "num_cpus": machine.usable_cores(),
            "include_dashboard": False,
            "object_store_memory": _STORE_BYTES,
            "_node_ip_address": "127.0.0.1",
        }
    try:
        # No runtime_env: one that the job has, too, is an error.
        with _undisturbed():
            ray.init(logging_level=logging.CRITICAL, log_to_driver=False, **options)
    except (Exception, SystemExit) as exc:
        raise _refusal(address, str(exc)) from exc
    _say_nothing(ray, is_silent=True)


def _disconnect() -> None:
    ray = require("ray", "--executor ray")
    _LINK.address = ""
    # A cluster that is gone has nothing to be told.
    with contextlib.suppress(Exception), _undisturbed():
        ray.shutdown()
    _say_nothing(ray, is_silent=False)


def _say_nothing(ray: Any, *, is_silent: bool) -> None:
    """Keep Ray's own messages off stdout: it prints each process that dies, whatever ``log_to_driver`` says."""
    # A name of its own modules: where another release lacks it, nothing is changed.
    with contextlib.suppress(AttributeError):
        if isinstance(ray._private.worker._worker_logs_enabled, bool):  # noqa: SLF001
            ray._private.worker._worker_logs_enabled = not is_silent  # noqa: SLF001


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the handlers of signals, and Ray's statistics of usage off, while Ray begins or ends."""
    before = os.environ.get("RAY_USAGE_STATS_ENABLED")
    os.environ["RAY_USAGE_STATS_ENABLED"] = before or "0"
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {signum: signal.getsignal(signum) for signum in _HANDLED} if is_main else {}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            if handler is not None:
                signal.signal(signum, handler)
        if before is None:
            del os.environ["RAY_USAGE_STATS_ENABLED"]


def _reachable(address: str, environ: Mapping[str, str] | None = None) -> str:
    """Return the address for Ray, after something there has answered.

    Raises:
        RequestError: nothing does.
    """
    named = (os.environ if environ is None else environ).get(_VARIABLE, "")
    if address == AUTO and named not in {"", AUTO}:
        try:
            address = parse_address(named)
        except ValueError as exc:
            raise _error(
                f"is auto, and {_VARIABLE} {exc}", f"unset {_VARIABLE}, or pass --ray-address"
            ) from exc
    if address == LOCAL:
        return LOCAL
    found = _running_here() if address == AUTO else address
    if not found:
        raise _error("is auto, but no Ray cluster runs on this machine", _START)
    try:
        with socket.create_connection(host_and_port(found), _ANSWER_SECONDS):
            return address
    except OSError as exc:
        if address == AUTO:
            raise _error(
                f"is auto, but the Ray cluster that ran here does not answer ({found})", _START
            ) from exc
        raise _silence(address, exc.strerror or str(exc)) from exc


def _running_here() -> str:
    """Return ``HOST:PORT`` of the cluster that Ray finds on this machine; empty where there is none."""
    from ray._private import services

    try:
        return str(services.get_ray_address_from_environment(AUTO, None))
    except ConnectionError:
        return ""


def _refusal(address: str, text: str) -> RequestError:
    """Return the error for a connection that Ray refused, by what it says."""
    versions = _VERSIONS.findall(text)
    if len(versions) == 2:
        (its_ray, its_python), (ray, python) = versions
        sentence = (
            f"is {address}, whose Ray is {its_ray} with Python {its_python}; here it is {ray} with {python}"
        )
        return _error(
            sentence, "run lora-merge in the cluster's own environment, by ray job submit, for example"
        )
    if address == LOCAL:
        first = next(iter(text.strip().splitlines()), "")[:200]
        return _error(
            f"is local, but no Ray cluster can be started here ({first})",
            "see the log in /tmp/ray/session_latest/logs",
        )
    # Something has answered before.
    sentence = (
        f"is {address}, which refused the connection ({next(iter(text.strip().splitlines()), '')[:200]})"
    )
    return _error(
        sentence,
        "a cluster that asks for a token needs RAY_AUTH_MODE=token here; or it is another service's port",
    )


def _silence(address: str, why: str) -> RequestError:
    hint = "pass the HOST:PORT that `ray start --head` printed; run lora-merge where the cluster's nodes can be reached"
    return _error(f"is {address}, but no Ray cluster answers there ({why})", hint)


def _error(sentence: str, hint: str) -> RequestError:
    return RequestError("", 0, "ray_address", sentence, hint=hint)
