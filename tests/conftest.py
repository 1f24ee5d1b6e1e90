"""Fixtures: the broker, a queue and an exchange of the test's own, and the two scripts as processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any, Callable, Iterator

import pika
import pytest

import broker as brokers
from broker import ROOT, Broker, eventually

# A shell's background jobs ignore it, and so would the scripts.
signal.signal(signal.SIGINT, signal.default_int_handler)
SCRIPTS = ("producer", "consumer")
TIMEOUT = 120  # seconds after which a script that should have ended has failed its test


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--broker", default="", metavar="docker|local|URL", help="default: docker, else local")
    parser.addoption("--python", default=sys.executable, help="what the scripts run with; default: this Python")
    parser.addoption("--seed", type=int, default=random.randrange(10**6), help="of what is random in the fault tests")


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.getoption('--seed')}"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ours: stops, kills or changes the broker, which has to be the tests' own")
    config.addinivalue_line("markers", "long: takes more than ten seconds")


@pytest.fixture(scope="session")
def session_broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    try:
        broker = brokers.choose(request.config.getoption("--broker"))
    except LookupError as error:
        pytest.exit(str(error), returncode=1)
    try:
        broker.start()
        yield broker
    finally:
        broker.remove()


@pytest.fixture
def broker(session_broker: Broker, request: pytest.FixtureRequest) -> Broker:
    """The broker, running. Tests that do more than use it are marked `ours`."""
    if request.node.get_closest_marker("ours") and not session_broker.ours:
        pytest.skip("stops, kills or changes the broker, and the one at --broker URL belongs to somebody else")
    return session_broker


@pytest.fixture
def python(request: pytest.FixtureRequest) -> str:
    """The Python that the scripts run with."""
    return str(request.config.getoption("--python"))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers, the same again for the same --seed and test."""
    return random.Random(f"{request.config.getoption('--seed')} {request.node.name}")


@pytest.fixture
def queue(broker: Broker) -> Iterator[str]:
    """A queue name of the test's own; the queue and its .dead are deleted afterwards."""
    name = f"pair-{uuid.uuid4().hex[:12]}"
    yield name
    with broker.connect() as connection:
        channel = connection.channel()
        channel.queue_delete(name)
        channel.queue_delete(f"{name}.dead")


@pytest.fixture
def exchange(broker: Broker) -> Iterator[str]:
    """An exchange name of the test's own; the exchange is deleted afterwards."""
    name = f"pair-{uuid.uuid4().hex[:12]}"
    yield name
    with broker.connect() as connection:
        connection.channel().exchange_delete(name)


class Script:
    """One of the scripts as a process, its output in files, so that it never waits for the test to read."""

    def __init__(self, command: list[str], directory: Path, **options: Any) -> None:
        self.stdout_path = directory / f"{uuid.uuid4().hex}.out"
        self.stderr_path = self.stdout_path.with_suffix(".err")
        options.setdefault("stdin", subprocess.PIPE)
        with open(self.stdout_path, "wb") as stdout, open(self.stderr_path, "wb") as stderr:
            options.setdefault("stdout", stdout)
            self.process = subprocess.Popen(command, stderr=stderr, **options)

    @property
    def stdout(self) -> bytes:
        return self.stdout_path.read_bytes()

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text()

    @property
    def bodies(self) -> list[bytes]:
        """The lines of stdout that are complete."""
        return self.stdout.split(b"\n")[:-1]

    def write(self, data: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def end(self, timeout: float = TIMEOUT) -> int:
        """Close stdin, wait for the exit code and return it."""
        if self.process.stdin and not self.process.stdin.closed:
            self.process.stdin.close()
        return self.process.wait(timeout)

    def terminate(self) -> int:
        """Send SIGTERM, and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


Start = Callable[..., Script]
Depth = Callable[[str], int]
UntilConsuming = Callable[..., None]


@pytest.fixture
def start(broker: Broker, tmp_path: Path, python: str) -> Iterator[Start]:
    """Start a script: start("producer", "-q", queue, "-", input=b"...") or start("consumer", handle="...").

    `input` becomes stdin, without it stdin is a pipe to write to; `handle` is Python that replaces `handle` of the
    consumer; `url` replaces the broker's; other options are those of subprocess.Popen. What still runs is killed
    after the test.
    """
    started = []

    def start(
        name: str, *arguments: str, input: bytes | None = None, handle: str = "", url: str = "", **options: Any
    ) -> Script:
        command = [python, str(ROOT / f"{name}.py"), *arguments]
        if handle:
            program = tmp_path / f"{uuid.uuid4().hex}.py"
            program.write_text(
                f"import contextlib, os, sys, time, consumer\n{handle}\nconsumer.handle = handle\nsys.exit(consumer.main())\n"
            )
            command[1] = str(program)
        environment = {**os.environ, "AMQP_URL": url or broker.url, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
        if input is not None:
            path = tmp_path / uuid.uuid4().hex
            path.write_bytes(input)
            options["stdin"] = path.open("rb")
        script = Script(command, tmp_path, env=environment, **options)
        started.append(script)
        return script

    yield start
    for script in started:
        if script.process.poll() is None:
            script.process.send_signal(signal.SIGCONT)
            script.kill()


class Gate:
    """Holds up a handler that has `statement` in it, until it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.statement = f"while not os.path.exists({str(path)!r}): time.sleep(0.01)"

    def open(self) -> None:
        self.path.touch()


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


Run = Callable[..., Script]


@pytest.fixture
def run(start: Start) -> Run:
    """Start a script as `start` does, and wait for its end; the exit code has to be `code`."""

    def run(name: str, *arguments: str, code: int = 0, **options: Any) -> Script:
        options.setdefault("input", b"")
        script = start(name, *arguments, **options)
        assert script.end() == code, script.stderr
        return script

    return run


@pytest.fixture
def depth(broker: Broker) -> Depth:
    return broker.depth


def consumers(broker: Broker, queue: str) -> int:
    """How many consumers the queue has; -1 if there is no such queue."""
    with broker.connect() as connection:
        try:
            return int(connection.channel().queue_declare(queue, passive=True).method.consumer_count)
        except pika.exceptions.ChannelClosedByBroker:
            return -1


@pytest.fixture
def until_consuming(broker: Broker) -> UntilConsuming:
    """Wait until the queue has that many consumers."""

    def wait(queue: str, count: int = 1) -> None:
        eventually(lambda: consumers(broker, queue) == count, what=f"{count} consumers on {queue}")

    return wait
