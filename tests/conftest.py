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

import pytest

import broker as brokers
from broker import ROOT, Broker, eventually
from proxy import Proxy

# A shell's background jobs ignore it, and so would the scripts.
signal.signal(signal.SIGINT, signal.default_int_handler)
SCRIPTS = ("producer", "consumer")
TIMEOUT = 120  # seconds after which a script that should have ended has failed its test
# What the consumer of most tests does with a message, so that they do not depend on what consumer.py does by itself.
HANDLE = "def handle(method, properties, body): sys.stdout.buffer.write(body + b'\\n')"
PROGRAM = """
import logging, os, sys, time
import consumer
logging.basicConfig(format="consumer.py: %(message)s", level=logging.INFO)
logging.getLogger("pika").setLevel(logging.CRITICAL + 1)
{handle}
consumer.handle = handle
sys.exit(consumer.main())
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--broker", default="", metavar="docker|local|URL", help="default: docker, else local")
    parser.addoption("--python", default=sys.executable, help="what the scripts run with; default: this Python")
    parser.addoption("--seed", type=int, default=random.randrange(10**6), help="of what is random in the fault tests")


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.getoption('--seed')}"


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
def broker(session_broker: Broker) -> Broker:
    """The broker, running. Tests do no more than use it."""
    return session_broker


@pytest.fixture
def own_broker(broker: Broker) -> Broker:
    """The broker, for tests that change it: not one that belongs to somebody else."""
    if not broker.ours:
        pytest.skip("changes the broker, and the one at --broker URL belongs to somebody else")
    return broker


@pytest.fixture
def python(request: pytest.FixtureRequest) -> str:
    """The Python that the scripts run with."""
    return str(request.config.getoption("--python"))


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


@pytest.fixture
def proxy(broker: Broker) -> Iterator[Proxy]:
    """In front of the broker, with connections that can be cut."""
    proxy = Proxy(broker.url)
    yield proxy
    proxy.refuse()


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

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the signal, and return the exit code."""
        self.process.send_signal(number)
        return self.end()


Start = Callable[..., Script]
Run = Callable[..., Script]


@pytest.fixture
def start(broker: Broker, tmp_path: Path, python: str) -> Iterator[Start]:
    """Start a script: start("producer", "-q", queue, "-", input=b"...") or start("consumer", handle="def handle...").

    `input` becomes stdin; without it, stdin is a pipe to write to. `handle` replaces `handle` of the consumer, "" leaves
    its own. `url` replaces the broker's. Other options are those of subprocess.Popen. What still runs is killed in the
    end.
    """
    started = []

    def start(
        name: str, *arguments: str, input: bytes | None = None, handle: str = HANDLE, url: str = "", **options: Any
    ) -> Script:
        program = ROOT / f"{name}.py"
        if name == "consumer" and handle:
            program = tmp_path / f"{uuid.uuid4().hex}.py"
            program.write_text(PROGRAM.format(handle=handle))
        environment = {**os.environ, "AMQP_URL": url or broker.url, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
        if input is not None:
            path = tmp_path / uuid.uuid4().hex
            path.write_bytes(input)
            options["stdin"] = path.open("rb")
        script = Script([python, str(program), *arguments], tmp_path, env=environment, **options)
        started.append(script)
        return script

    yield start
    for script in started:
        if script.process.poll() is None:
            script.process.kill()
            script.process.wait()


@pytest.fixture
def run(start: Start) -> Run:
    """Start a script as `start` does, and wait for its end; the exit code has to be `code`."""

    def run(name: str, *arguments: str, code: int = 0, **options: Any) -> Script:
        options.setdefault("input", b"")
        script = start(name, *arguments, **options)
        assert script.end() == code, script.stderr
        return script

    return run


class Gate:
    """Holds up a handler that has `statement` in it, until it is opened."""

    def __init__(self, path: Path) -> None:
        self.open = path.touch
        self.statement = f"while not os.path.exists({str(path)!r}): time.sleep(0.01)"


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


UntilConsuming = Callable[..., None]


@pytest.fixture
def until_consuming(broker: Broker) -> UntilConsuming:
    """Wait until the queue has that many consumers."""

    def wait(queue: str, count: int = 1) -> None:
        def consuming() -> bool:
            found = broker.queue(queue)
            return bool(found) and found.consumer_count == count

        eventually(consuming, what=f"{count} consumers on {queue}")

    return wait
