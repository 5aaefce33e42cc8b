"""The campaign's own tools: a proxy that breaks what it says, a table that says what happened."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from harness.cases import CASES, EXISTING
from harness.chaos import Chaos
from harness.table import Told, verdict, write

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def echo() -> Iterator[Chaos]:
    """A proxy before a server that says again what it hears, until it hears the end."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(line: socket.socket) -> None:
        with line, suppress(OSError):
            while heard := line.recv(1000):
                line.sendall(heard)
            line.sendall(b".")

    stopped = threading.Event()

    def serve() -> None:
        with listener:
            while not stopped.is_set():
                line, _ = listener.accept()
                threading.Thread(target=answer, args=(line,), daemon=True).start()

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    proxy = Chaos(f"127.0.0.1:{listener.getsockname()[1]}")
    yield proxy
    proxy.mend()
    stopped.set()
    with line_to(proxy) as line:
        said(line, b"wake up")
    proxy.stop()
    server.join(5)
    assert not server.is_alive()


def line_to(proxy: Chaos) -> socket.socket:
    host, port = proxy.address.split(":")
    line = socket.create_connection((host, int(port)), timeout=5)
    line.settimeout(0.5)
    return line


def said(line: socket.socket, text: bytes) -> bytes:
    """The echo; b"" for a line that is broken, b"?" for silence."""
    try:
        line.sendall(text)
        return line.recv(1000)
    except TimeoutError:
        return b"?"
    except OSError:
        return b""


def knock(proxy: Chaos) -> bytes:
    """What a new line hears; b"" where there is none."""
    try:
        with line_to(proxy) as line:
            return said(line, b"knock")
    except OSError:
        return b""


def test_without_a_fault_bytes_pass_both_ways(echo: Chaos) -> None:
    with line_to(echo) as line:
        assert said(line, b"one") == b"one"
    assert (echo.passed_up, echo.passed_down) == (3, 3)


def test_a_cut_breaks_what_is_open_and_what_is_new_until_it_is_mended(echo: Chaos) -> None:
    with line_to(echo) as line:
        assert said(line, b"one") == b"one"
        echo.cut()
        assert said(line, b"two") == b""
    assert knock(echo) == b""
    echo.mend()
    with line_to(echo) as line:
        assert said(line, b"four") == b"four"


def test_a_hole_keeps_the_line_open_and_silent(echo: Chaos) -> None:
    with line_to(echo) as line:
        assert said(line, b"one") == b"one"
        echo.black_hole()
        assert said(line, b"two") == b"?"
        echo.mend()
        assert said(line, b"three") == b""


def test_a_slow_line_takes_its_time_upwards(echo: Chaos) -> None:
    echo.slow(up_bytes_s=1000)
    with line_to(echo) as line:
        line.settimeout(5)
        since = time.monotonic()
        assert said(line, b"x" * 100)
        assert time.monotonic() - since > 0.09


def test_a_truncated_line_ends_after_its_bytes(echo: Chaos) -> None:
    echo.truncate(4)
    with line_to(echo) as line:
        said(line, b"1234")
        assert said(line, b"5") == b""


def test_a_half_close_tells_the_other_side_of_the_end_alone(echo: Chaos) -> None:
    with line_to(echo) as line:
        assert said(line, b"one") == b"one"
        echo.half_close()
        assert line.recv(10) == b"."


@pytest.mark.parametrize(
    ("own", "others", "is_"),
    [
        ([], [], "**not run**"),
        (["begun"], [], "**not run**"),
        (["passed"], [], "holds"),
        (["passed", "failed"], [], "**fails**"),
        (["passed"], ["failed"], "**fails**"),
        ([], ["passed"], "holds (no process of its own)"),
        (["skipped"], [], "not run here"),
        (["skipped", "passed"], [], "in part"),
    ],
)
def test_a_verdict_follows_from_the_outcomes_alone(
    own: list[str], others: list[str], is_: str
) -> None:
    assert verdict([Told("a", o) for o in own], [Told("b", o) for o in others]) == is_


def test_what_a_case_does_not_reach_is_said(tmp_path: Path) -> None:
    told = [Told("t", "passed", did={19: "this"}, short="not that", seen=["x | y"])]
    write(told, tmp_path / "r.md")
    text = (tmp_path / "r.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| 19 ")]
    assert row.endswith("| this | x \\| y; not that | in part |")
    assert text.count("**not run**") == len(CASES) - 1


def test_the_tests_that_belong_to_a_case_are_there() -> None:
    for test in (test for tests in EXISTING.values() for test in tests):
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(), test
