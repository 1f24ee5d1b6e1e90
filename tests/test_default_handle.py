"""The consumer as it is: its own `handle` writes each body to standard output, one a line."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from broker import Broker
from conftest import Publish, Run, Start, Worker

pytestmark = pytest.mark.default_handle
LINES = {
    "numbers": b"".join(b"%d\n" % number for number in range(3000)),
    "CRLF, empty lines and NULs": b"one\r\n\r\n\n\n\0\n\0\0two\0\n\xff\xfe\n",
    "lines of megabytes": b"a" * 3_000_000 + b"\n" + b"b" * 5_000_000 + b"\n\nc\n",
    "no newline in the end": b"one\ntwo",
}


def test_hello_world_from_copies_in_an_empty_directory(
    broker: Broker, paths: dict[str, Path], python: str, queue: str, tmp_path: Path
) -> None:
    def run(*command: str) -> subprocess.CompletedProcess[str]:
        environment = {"AMQP_URL": broker.url, "PYTHONDEVMODE": "1"}  # which complains of what is left open
        return subprocess.run([python, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)

    shutil.copy(paths["producer"], tmp_path / "producer.py")
    shutil.copy(paths["consumer"], tmp_path / "consumer.py")

    sent = run("producer.py", "-q", queue, "Hello World!")
    received = run("consumer.py", "-q", queue, "--count", "1")

    assert (sent.returncode, sent.stdout, sent.stderr) == (0, "", "producer.py: 1 message published\n")
    assert (received.returncode, received.stdout, received.stderr) == (0, "Hello World!\n", "")


@pytest.mark.parametrize("data", LINES.values(), ids=LINES)
def test_every_byte_of_standard_input_comes_back(run: Run, queue: str, data: bytes) -> None:
    lines = data.count(b"\n") + (not data.endswith(b"\n"))

    producer = run("producer", "-q", queue, "-", input=data)
    consumer = run("consumer", "-q", queue, "--drain", handle="")

    assert producer.messages == [f"{lines} messages published"]
    assert consumer.stdout == data + (b"" if data.endswith(b"\n") else b"\n")


def test_a_reader_that_goes_leaves_the_rest_in_the_queue(start: Start, run: Run, queue: str, publish: Publish) -> None:
    publish(queue, "one")
    consumer = start("consumer", "-q", queue, handle="", stdout=subprocess.PIPE, env={"PYTHONUNBUFFERED": ""})
    assert consumer.process.stdout
    assert consumer.process.stdout.readline() == b"one\n"

    consumer.process.stdout.close()
    publish(queue, "two", "three")

    assert (consumer.end(), consumer.stderr) == (0, "")
    assert run("consumer", "-q", queue, "--drain", handle="").bodies == [b"two", b"three"]


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_full_disk_stops_the_consumer(start: Start, run: Run, queue: str, unbuffered: str, publish: Publish) -> None:
    publish(queue, "one", "two")

    with open("/dev/full", "wb") as device:
        full = start("consumer", "-q", queue, handle="", stdout=device, env={"PYTHONUNBUFFERED": unbuffered})

    assert full.end() == 1
    assert full.stderr == "error: standard output: No space left on device\n"
    assert run("consumer", "-q", queue, "--drain", handle="").bodies == [b"one", b"two"]


def test_a_handle_is_tested_with_the_fixture_for_it(worker: Worker) -> None:
    worker.publish(b"one", b"two")

    assert worker.run(count=2).stdout == b"one\ntwo\n"

    assert worker.dead_letters() == 0
