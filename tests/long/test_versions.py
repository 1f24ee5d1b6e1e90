"""The oldest pika that the scripts are for, in an environment of its own. All other tests are with the newest."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from broker import Broker, eventually
from conftest import Run, Start
from long.faults import Stream, until_tried
from proxy import Proxy

HANDLE = """
QUEUE_ARGUMENTS.update({"x-delivery-limit": 1, "x-delayed-retry-min": 1})
def handle(method, properties, body):
    print(body.decode())
    assert body != b"bad"
"""


@pytest.fixture(scope="module")
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("venv")
    subprocess.run([request.config.getoption("--python"), "-m", "venv", str(directory)], check=True)
    subprocess.run([str(directory / "bin" / "pip"), "install", "-q", "pika==1.2.0"], check=True)
    return directory


@pytest.fixture
def python(environment: Path) -> str:
    """What `start` and `run` have the scripts run with."""
    return str(environment / "bin" / "python")


def test_hello_world_arrives(run: Run, queue: str) -> None:
    run("producer", "-q", queue, "Hello World!")

    assert run("consumer", "-q", queue, "--drain", handle="").stdout == b"Hello World!\n"


def test_lines_arrive_in_their_order(run: Run, queue: str) -> None:
    lines = b"".join(b"%d\n" % number for number in range(2000))

    run("producer", "-q", queue, "-", input=lines)

    assert run("consumer", "-q", queue, "--drain").stdout == lines


def test_a_message_that_the_handler_fails_on_moves_to_dead(start: Start, run: Run, queue: str, broker: Broker) -> None:
    consumer = start("consumer", "-q", queue, handle=HANDLE)
    eventually(lambda: broker.depth(f"{queue}.dead") == 0)

    run("producer", "-q", queue, "one", "bad", "two")

    eventually(lambda: broker.depth(f"{queue}.dead") == 1)
    eventually(lambda: sorted(consumer.bodies) == [b"bad", b"bad", b"one", b"two"])
    assert consumer.stop() == 0
    assert broker.depth(queue) == 0


def test_nothing_is_lost_when_the_connection_is_cut(start: Start, broker: Broker, queue: str, proxy: Proxy) -> None:
    stream = Stream(start, broker, queue, url=proxy.url)
    stream.flow(1000)

    proxy.cut()
    until_tried(*stream.scripts)

    stream.flow(1000)
    stream.account()
