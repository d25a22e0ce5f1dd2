"""What speaks to a network in a test is refused and seen, though whoever asked swallows the refusal."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

ASK = """
import socket
try:
    {call}
except Exception as exc:
    print(type(exc).__name__)
"""
CALLS = (
    "socket.create_connection(('192.0.2.1', 80), timeout=1)",
    "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
    "socket.socket().connect_ex(('127.0.0.1', 9))",
    "socket.getaddrinfo('hub.invalid', 443)",
    "__import__('urllib.request').request.urlopen('http://hub.invalid/x')",
)


@pytest.mark.parametrize("call", CALLS)
def test_a_process_that_swallows_the_refusal_is_seen(call, no_sockets):
    done = subprocess.run(
        [sys.executable, "-c", ASK.format(call=call)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() in {"PermissionError", "URLError"}
    assert "socket." in no_sockets.read_text()
    no_sockets.unlink()


@pytest.mark.parametrize("call", CALLS)
def test_so_is_a_test_itself(call, no_sockets):
    exec(ASK.format(call=call))
    assert "socket." in no_sockets.read_text()
    no_sockets.unlink()


def test_processes_of_one_machine_may_speak_by_the_file_system(no_sockets, tmp_path):
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(tmp_path / "s"))
        server.listen()
        client.connect(str(tmp_path / "s"))
    assert not no_sockets.exists()


@pytest.mark.loopback
def test_a_marked_test_may_speak_to_this_machine_and_to_no_other(no_sockets):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        assert not no_sockets.exists()
    with pytest.raises(PermissionError):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    no_sockets.unlink()
