"""--timeout is kept, whatever keeps messages from being confirmed; and the next broker gets its turn."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from contextlib import ExitStack
from types import ModuleType
from typing import Callable, Iterator

import pytest

from broker import Broker, eventually
from conftest import SCRIPTS, Start
from long.faults import freeze, thaw
from proxy import Proxy

SOON = 12  # seconds in which a script with --timeout 3 has ended, also on a busy machine; before, it took up to minutes


@pytest.fixture
def mute_port() -> Iterator[int]:
    """A port that takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_mute_port_is_given_up(start: Start, name: str, queue: str, mute_port: int) -> None:
    script = start(
        name, "-q", queue, "--timeout", "3", *["one"][name == "consumer" :], url=f"amqp://127.0.0.1:{mute_port}"
    )

    assert script.end(SOON) == 1

    assert script.messages[-1].startswith(f"error: 127.0.0.1:{mute_port}: ")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_mute_port_does_not_hide_the_next_url(
    start: Start, broker: Broker, name: str, queue: str, mute_port: int
) -> None:
    url = f"amqp://127.0.0.1:{mute_port}, {broker.url}"

    script = start(name, "-q", queue, "--timeout", "8", *["one", "--drain"][name == "consumer" :][:1], url=url)

    assert script.end() == 0, script.stderr
    assert len(script.tries) == 1


def fill(broker: Broker) -> None:
    broker.ctl("set_vm_memory_high_watermark", "0.00001")


def empty(broker: Broker) -> None:
    broker.ctl("set_vm_memory_high_watermark", "0.4")


FAULTS = {"frozen": (freeze, thaw), "short of memory": (fill, empty)}


@pytest.mark.parametrize(("fault", "repair"), FAULTS.values(), ids=FAULTS)
def test_a_broker_that_confirms_nothing_is_given_up(
    fault: Callable[[Broker], None], repair: Callable[[Broker], None],
    start: Start, producer: ModuleType, own_broker: Broker, queue: str,
) -> None:  # fmt: skip
    script = start("producer", "-q", queue, "--timeout", "3", "-")
    script.write(b"one\n")
    publisher = producer.Producer(producer.parse(["--url", own_broker.url, "-q", queue, "--timeout", "3"]))
    publisher.publish([b"two"])
    eventually(lambda: own_broker.depth(queue) == 2)

    with ExitStack() as stack:
        fault(own_broker)
        stack.callback(repair, own_broker)
        script.write(b"three\n")
        assert script.end(SOON) == 1
        forty_megabytes = [b"x" * 1_000_000] * 40  # more than the sockets take
        with pytest.raises(producer.ERRORS):
            publisher.publish(forty_megabytes)

    assert script.messages[-1].endswith("; 1 messages are safe")
    assert publisher.publish([b"four"]) == 0
    publisher.close()


def test_a_line_larger_than_the_sockets_is_given_up_during_an_alarm(
    start: Start, own_broker: Broker, queue: str
) -> None:
    script = start("producer", "-q", queue, "--timeout", "3", "-")
    script.write(b"one\n")
    eventually(lambda: own_broker.depth(queue) == 1)

    fill(own_broker)
    try:
        script.write(b"x" * 15_000_000 + b"\n")
        assert script.end(SOON) == 1
    finally:
        empty(own_broker)

    assert script.messages[-1].endswith("; 1 messages are safe")


@pytest.fixture
def drop(proxy: Proxy) -> Iterator[Callable[[], None]]:
    """From now on, packets to and from the proxy vanish without a word."""
    if os.geteuid() or not shutil.which("iptables"):
        pytest.skip("drops packets, for which it needs root and iptables")
    rules = [["INPUT", "-i", "lo", "-p", "tcp", port, str(proxy.port), "-j", "DROP"] for port in ("--dport", "--sport")]

    def drop() -> None:
        for rule in rules:
            subprocess.run(["iptables", "-I", *rule], check=True)

    yield drop
    for rule in rules:
        subprocess.run(["iptables", "-D", *rule], check=False, stderr=subprocess.DEVNULL)


def test_a_broker_that_vanishes_does_not_hide_the_next_url(
    start: Start, broker: Broker, queue: str, proxy: Proxy, drop: Callable[[], None]
) -> None:
    producer = start("producer", "-q", queue, "--timeout", "10", "-", url=f"{proxy.url},{broker.url}")
    producer.write(b"one\n")
    eventually(lambda: broker.depth(queue) == 1)

    drop()
    producer.write(b"two\n")

    eventually(lambda: broker.depth(queue) == 2)
    assert producer.end() == 0, producer.stderr
    (said,) = [message for message in producer.messages if "next try" in message]
    assert f"127.0.0.1:{proxy.port}: " in said
