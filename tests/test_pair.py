"""The main job: from a shell to a message that is safe, and back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from broker import ROOT, Broker, eventually
from conftest import SCRIPTS, Run, Start


def test_hello_world_goes_from_the_producer_to_the_consumer(run: Run, queue: str) -> None:
    producer = run("producer", "-q", queue)

    consumer = run("consumer", "-q", queue, "--drain")

    assert producer.stderr == "producer.py: 1 message published\n"
    assert producer.stdout == b""
    assert consumer.stdout == b"Hello World!\n"
    assert consumer.stderr == ""


def test_nothing_is_left_open(run: Run, queue: str) -> None:
    complain = {"PYTHONDEVMODE": "1"}

    producer = run("producer", "-q", queue, env=complain)
    consumer = run("consumer", "-q", queue, "--drain", env=complain)

    assert producer.stderr == "producer.py: 1 message published\n"
    assert consumer.stderr == ""


def test_each_argument_is_a_message(run: Run, queue: str) -> None:
    run("producer", "one", "-q", queue, "two", "", "--", "-v", "\udcff\udcfe")

    run("producer", "-q", queue, "--", "-q", "--")
    assert run("consumer", "-q", queue, "--drain").bodies == [b"one", b"two", b"", b"-v", b"\xff\xfe", b"-q", b"--"]


LINES = {
    "a text": (Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"),
    "a compiled binary": Path(os.path.realpath(sys.executable)),
    "CRLF, empty lines and NULs": b"one\r\n\r\n\n\n\0\n\0\0two\0\n",
    "lines of megabytes": b"a" * 3_000_000 + b"\n" + b"b" * 5_000_000 + b"\n\nc\n",
    "100,000 lines": b"".join(b"%d\n" % number for number in range(100_000)),
    "an empty line": b"\n",
}


@pytest.mark.parametrize("data", LINES.values(), ids=LINES)
def test_every_byte_of_standard_input_comes_back(run: Run, queue: str, data: bytes | Path) -> None:
    if isinstance(data, Path):
        data = data.read_bytes()
    lines = data.count(b"\n") + (not data.endswith(b"\n"))

    producer = run("producer", "-q", queue, "-", input=data)
    consumer = run("consumer", "-q", queue, "--drain")

    assert producer.stderr == f"producer.py: {lines} message{'s' * (lines != 1)} published\n"
    assert consumer.stdout == data + (b"" if data.endswith(b"\n") else b"\n")


def test_a_last_line_without_newline_counts(run: Run, queue: str) -> None:
    run("producer", "-q", queue, "-", input=b"one\ntwo")

    assert run("consumer", "-q", queue, "--drain").bodies == [b"one", b"two"]


def test_empty_input_is_no_message(run: Run, queue: str) -> None:
    assert run("producer", "-q", queue, "-", input=b"").stderr == "producer.py: 0 messages published\n"

    assert run("consumer", "-q", queue, "--drain").bodies == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_works_alone_in_an_empty_directory(
    name: str, python: str, broker: Broker, queue: str, tmp_path: Path
) -> None:
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    command = [python, f"{name}.py", "-q", queue, *(["--drain"] if name == "consumer" else [])]

    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "AMQP_URL": broker.url}, timeout=60)

    assert done.returncode == 0


def test_a_typed_line_arrives_while_the_producer_waits_for_the_next(start: Start, queue: str) -> None:
    producer, consumer = start("producer", "-q", queue, "-"), start("consumer", "-q", queue)

    for lines in [b"one"], [b"one", b"two"], [b"one", b"two", b"three"]:
        producer.write(lines[-1] + b"\n")
        eventually(lambda lines=lines: consumer.bodies == lines)  # type: ignore[misc]

    assert producer.process.poll() is None
    assert producer.end() == 0
    assert consumer.terminate() == 0
