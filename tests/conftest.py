"""Fixtures: the broker, a queue and an exchange of the test's own, and the two scripts as processes."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Iterator

import pytest

from broker import ROOT, Broker, choose, eventually
from proxy import Proxy

# A shell's background jobs ignore it, and so would the scripts.
signal.signal(signal.SIGINT, signal.default_int_handler)
SCRIPTS = ("producer", "consumer")
TIMEOUT = 120  # seconds after which a script that should have ended has failed its test
# Has a message that failed come again at once, and move to NAME.dead after three tries.
HASTY = {"x-delivery-limit": 2, "x-delayed-retry-min": 1, "x-delayed-retry-max": 1}
# So that most tests do not depend on what the consumer under test does by itself.
WRITE_LINES = "def handle(method, properties, body): os.write(1, body + b'\\n')"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--broker", default="", metavar="docker|local|URL", help="default: docker, else local")
    parser.addoption("--consumer", metavar="PATH", help="a copy of consumer.py, whose `handle` is another")
    parser.addoption("--producer", metavar="PATH", help="a copy of producer.py")
    parser.addoption("--options-in", help="see .pytest.ini")
    parser.addoption("--python", default=sys.executable, help="what the scripts run with; default: this Python")
    parser.addoption("--seed", type=int, default=random.randrange(10**6), help="of what is random in the fault tests")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "default_handle: is about the `handle` that consumer.py has before it is copied")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--consumer"):
        deselected = [item for item in items if item.get_closest_marker("default_handle")]
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.getoption('--seed')}"


@pytest.fixture(scope="session")
def session_broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    try:
        broker = choose(request.config.getoption("--broker"))
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


@pytest.fixture(scope="session")
def paths(request: pytest.FixtureRequest) -> dict[str, Path]:
    """Where the scripts under test are."""
    return {name: ROOT / (request.config.getoption(f"--{name}") or f"{name}.py") for name in SCRIPTS}


def load(path: Path) -> ModuleType:
    """The script as a module of its own."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def producer(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.chdir(tmp_path)  # where a copy may put the files that it opens
    return load(paths["producer"])


@pytest.fixture
def consumer(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.chdir(tmp_path)
    return load(paths["consumer"])


@pytest.fixture
def publisher(producer: ModuleType, broker: Broker, queue: str) -> Iterator[Any]:
    """A Producer for the queue, in this process."""
    publisher = producer.Producer(producer.parse(["--url", broker.url, "-q", queue]))
    yield publisher
    publisher.close()


Publish = Callable[..., None]


@pytest.fixture
def publish(producer: ModuleType, broker: Broker) -> Publish:
    """Publish texts to a queue, which is declared if need be: publish(queue, "one", "two")."""

    def publish(queue: str, *texts: str) -> None:
        publisher = producer.Producer(producer.parse(["--url", broker.url, "-q", queue]))
        assert publisher.publish([text.encode() for text in texts]) == 0
        publisher.close()

    return publish


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
def hasty_queue(queue: str, broker: Broker, consumer: ModuleType) -> str:
    """The queue, which exists, and is HASTY."""
    consumer.QUEUE_ARGUMENTS.update(HASTY)
    with broker.connect() as connection:
        consumer.declare(connection, consumer.parse(["-q", queue]))
    return queue


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

    def __init__(self, command: list[str], name: str, directory: Path, **options: Any) -> None:
        self.name = name  # of its file, which its messages begin with
        self.stdout_path = directory / f"{uuid.uuid4().hex}.out"
        self.stderr_path = self.stdout_path.with_suffix(".err")
        options.setdefault("stdin", subprocess.PIPE)
        with open(self.stdout_path, "wb") as stdout, open(self.stderr_path, "wb") as stderr:
            options.setdefault("stdout", stdout)
            self.process = subprocess.Popen(command, stderr=stderr, cwd=directory, **options)

    @property
    def stdout(self) -> bytes:
        return self.stdout_path.read_bytes()

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text()

    @property
    def messages(self) -> list[str]:
        """The lines of stderr without the name of the file that each of them begins with."""
        return [line.partition(f"{self.name}: ")[2] or line for line in self.stderr.splitlines()]

    @property
    def tries(self) -> list[float]:
        """The pauses that it announced because the broker was away."""
        return [float(pause) for pause in re.findall(r"; next try in (\d\.\d) s$", self.stderr, flags=re.MULTILINE)]

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
def start(broker: Broker, paths: dict[str, Path], tmp_path: Path, python: str) -> Iterator[Start]:
    """Start a script: start("producer", "-q", queue, "-", input=b"...") or start("consumer", handle="def handle...").

    `input` becomes stdin; without it, stdin is a pipe to write to. `handle` replaces `handle` of the consumer, "" leaves
    its own. `url` replaces the broker's. Other options are those of subprocess.Popen. What still runs is killed in the
    end.
    """
    started = []

    def start(
        name: str, *arguments: str, input: bytes | None = None, handle: str = WRITE_LINES, url: str = "", **options: Any
    ) -> Script:
        command = [python, str(paths[name])]
        if name == "consumer" and handle:
            other = tmp_path / f"{uuid.uuid4().hex}.py"
            other.write_text(handle)
            command = [python, str(ROOT / "tests" / "with_handle.py"), str(paths[name]), str(other)]
        environment = {**os.environ, "AMQP_URL": url or broker.url, **options.pop("env", {})}
        if input is not None:
            path = tmp_path / uuid.uuid4().hex
            path.write_bytes(input)
            options["stdin"] = path.open("rb")
        script = Script([*command, *arguments], paths[name].name, tmp_path, env=environment, **options)
        started.append(script)
        return script

    yield start
    for script in started:
        if script.process.poll() is None:
            script.process.kill()
            script.process.wait()
        print(script.stderr)  # pytest shows it if the test has failed


@pytest.fixture
def run(start: Start) -> Run:
    """Start a script as `start` does, and wait for its end; the exit code has to be `code`."""

    def run(name: str, *arguments: str, code: int = 0, **options: Any) -> Script:
        options.setdefault("input", b"")
        script = start(name, *arguments, **options)
        assert script.end() == code, script.stderr
        return script

    return run


class Worker:
    """The consumer with its own `handle`, a queue, and a way to publish to it: all that a test of a `handle` needs."""

    def __init__(self, run: Run, publisher: Any, broker: Broker, queue: str, directory: Path) -> None:
        self.run_script, self.publisher, self.broker, self.queue = run, publisher, broker, queue
        self.directory = directory  # the worker's current directory

    def publish(self, *bodies: bytes, **properties: Any) -> None:
        self.publisher.publish(bodies, **properties)

    def run(self, count: int) -> Script:
        """Run the worker until so many messages have been given to `handle`; its `stdout` and `stderr` tell the rest."""
        return self.run_script("consumer", "-q", self.queue, "--count", str(count), handle="")

    def dead_letters(self) -> int:
        """How many messages have moved to NAME.dead."""
        return self.broker.depth(f"{self.queue}.dead")


@pytest.fixture
def worker(run: Run, publisher: Any, broker: Broker, queue: str, tmp_path: Path) -> Worker:
    return Worker(run, publisher, broker, queue, tmp_path)


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
