"""What fails waits, and the rest flows; nothing is tried in a busy loop; what is away for a while costs no message."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any, Callable

import pytest

from broker import Broker, eventually
from conftest import HASTY, Gate, Publish, Run, Script, Start
from long.conftest import Somebody
from proxy import Proxy

FAILING = """
def handle(method, properties, body):
    os.write(1, body + b"\\n")
    assert body != b"bad"
"""
SHARES = {"1 %": (100, 10), "a fifth": (5, 10), "a fifth, --prefetch 1": (5, 1)}


@pytest.mark.parametrize(("every", "prefetch"), SHARES.values(), ids=SHARES)
def test_what_fails_does_not_hold_up_the_others(
    every: int, prefetch: int, start: Start, broker: Broker, queue: str, publish: Publish, rng: random.Random
) -> None:
    count = 600

    def seconds(bad: int) -> float:
        """How long it takes until the good ones are handled."""
        good = count - bad
        others = ["bad"] * bad + ["good"] * (good - 1)
        publish(queue, "good", *rng.sample(others, len(others)))  # the first shows that not everything fails
        began = time.monotonic()
        consumer = start("consumer", "-q", queue, "--prefetch", str(prefetch), handle=FAILING)
        eventually(lambda: consumer.bodies.count(b"good") >= good, timeout=120)
        took = time.monotonic() - began
        assert consumer.stop() == 0
        assert ("error: message" in consumer.stderr) == bool(bad)
        assert consumer.bodies.count(b"good") == good
        return took

    without = seconds(bad=0)
    bad = count // every
    tries = 1 if broker.version() >= (4, 3) else 21  # which all come before the others, before RabbitMQ 4.3

    assert seconds(bad) < 4 * without * (count + tries * bad) / count


@pytest.mark.parametrize("prefetch", ["10", "1"])
def test_a_stream_flows_while_each_fifth_message_fails(prefetch: str, start: Start, queue: str, publisher: Any) -> None:
    consumer = start("consumer", "-q", queue, "--prefetch", prefetch, handle=FAILING)

    for number in range(150):
        publisher.publish([b"bad" if number % 5 == 4 else b"good"])
        time.sleep(0.02)  # the pace of the stream

    eventually(lambda: consumer.bodies.count(b"good") == 120, timeout=20)  # it was minutes when failures stopped it
    assert consumer.bodies.count(b"bad") >= 30
    assert consumer.stop() == 0


def test_a_dependency_that_is_away_costs_no_message(
    start: Start, broker: Broker, queue: str, publish: Publish, tmp_path: Path
) -> None:
    available = tmp_path / "available"
    available.touch()
    handle = f"def handle(method, properties, body): open({str(available)!r}); os.write(1, body + b'\\n')"
    consumer = start("consumer", "-q", queue, handle=handle)
    publish(queue, *["before"] * 50)
    eventually(lambda: len(consumer.bodies) == 50)

    available.unlink()
    publish(queue, *["meanwhile"] * 300)
    eventually(lambda: consumer.stderr.count("FileNotFoundError") >= 100)
    tries = Counter(re.findall(r"error: message '(\w+)'", consumer.stderr))
    available.touch()

    eventually(lambda: consumer.bodies.count(b"meanwhile") == 300)
    assert consumer.stop() == 0
    assert broker.depth(f"{queue}.dead") == broker.depth(queue) == 0
    assert max(tries.values()) <= 11  # at once; the others last for a minute


QUEUES: dict[str, dict[str, object]] = {
    "classic": {},
    "quorum, without delayed retries": {"x-queue-type": "quorum", "x-delivery-limit": 2**31 - 1},
}


def tries_in_four_seconds(consumer: Script) -> int:
    eventually(lambda: consumer.bodies)
    time.sleep(4)  # the subject: how often it tries meanwhile
    assert consumer.stop() == 0
    return len(consumer.bodies)


@pytest.mark.parametrize("arguments", QUEUES.values(), ids=QUEUES)
def test_a_queue_of_another_kind_is_no_busy_loop(
    arguments: dict[str, object], start: Start, broker: Broker, queue: str, publish: Publish
) -> None:
    with broker.connect() as connection:
        connection.channel().queue_declare(queue, durable=True, arguments=arguments)
    publish(queue, "bad", "bad")

    tries = tries_in_four_seconds(start("consumer", "-q", queue, handle=FAILING))

    assert 4 <= tries <= 50
    assert broker.depth(queue) == 2


def test_a_consumer_of_dead_letters_that_fails_is_no_busy_loop(
    start: Start, run: Run, broker: Broker, queue: str, publish: Publish
) -> None:
    publish(queue, "bad", "bad")
    run("consumer", "-q", queue, "--count", "2", handle="def handle(method, properties, body): raise Reject")
    eventually(lambda: broker.depth(f"{queue}.dead") == 2)

    tries = tries_in_four_seconds(start("consumer", "-q", f"{queue}.dead", handle=FAILING))

    assert 4 <= tries <= 50
    assert broker.depth(f"{queue}.dead") == 2


def test_what_fails_each_time_a_queue_is_drained_moves_to_dead(run: Run, broker: Broker, hasty_queue: str) -> None:
    run("producer", "-q", hasty_queue, "bad")
    handle = f"QUEUE_ARGUMENTS.update({HASTY})\n{FAILING}"

    tries = 0
    while broker.depth(f"{hasty_queue}.dead") == 0:
        tries += len(run("consumer", "-q", hasty_queue, "--drain", handle=handle).bodies)
        assert tries <= 3

    assert tries == 3


def test_count_takes_no_more_messages_than_it_handles(
    start: Start, broker: Broker, queue: str, publish: Publish, gate: Gate
) -> None:
    publish(queue, "one", "two", "three")
    handle = f"def handle(method, properties, body):\n    {gate.statement}"

    consumer = start("consumer", "-q", queue, "--count", "1", "--prefetch", "100", handle=handle)

    eventually(lambda: broker.depth(queue) == 2)
    gate.open()
    assert consumer.end() == 0
    assert broker.take(queue) == [b"two", b"three"]


def test_a_process_that_handle_forks_can_be_terminated(run: Run, queue: str, publish: Publish) -> None:
    publish(queue, "one")
    handle = """
import multiprocessing
fork = multiprocessing.get_context("fork")
running = fork.Event()
def run():
    running.set()
    time.sleep(600)
def handle(method, properties, body):
    child = fork.Process(target=run)
    child.start()
    running.wait()
    child.terminate()
    child.join(20)
    print(child.exitcode)
    child.kill()
"""

    assert run("consumer", "-q", queue, "--count", "1", handle=handle).bodies == [b"-15"]


def test_a_final_error_is_reported_before_the_handler_has_ended(
    start: Start, own_broker: Broker, queue: str, publish: Publish, proxy: Proxy, somebody: Somebody, gate: Gate
) -> None:
    publish(queue, "one")
    handle = f"def handle(method, properties, body):\n    os.write(1, b'begun\\n')\n    {gate.statement}"
    consumer = start("consumer", "-q", queue, handle=handle, url=somebody(proxy.url))
    eventually(lambda: consumer.bodies)

    own_broker.ctl("delete_user", "somebody")
    proxy.cut()

    eventually(lambda: "error: 127.0.0.1:" in consumer.stderr)
    assert consumer.process.poll() is None
    gate.open()
    assert consumer.end() == 1


def limit_user(broker: Broker, number: int) -> None:
    broker.ctl("set_user_limits", "somebody", f'{{"max-connections": {number}}}')


def limit_virtual_host(broker: Broker, number: int) -> None:
    broker.ctl("set_vhost_limits", "-p", "/", f'{{"max-connections": {number}}}')


@pytest.mark.parametrize("limit", [limit_user, limit_virtual_host])
def test_a_limit_of_connections_is_waited_for(
    limit: Callable[[Broker, int], None], start: Start, own_broker: Broker, queue: str, somebody: Somebody
) -> None:
    url = somebody()
    limit(own_broker, 0)
    try:
        producer, consumer = start("producer", "-q", queue, "one", url=url), start("consumer", "-q", queue, url=url)
        eventually(lambda: producer.tries and consumer.tries)
    finally:
        limit(own_broker, -1)

    assert producer.end() == 0, producer.stderr
    eventually(lambda: consumer.bodies == [b"one"])
    assert consumer.stop() == 0
    for script in producer, consumer:
        assert "NOT_ALLOWED" in script.messages[0]
        assert "limit" in script.messages[0]


def test_what_finds_a_queue_when_it_is_sent_again_is_not_unroutable(
    producer: ModuleType, broker: Broker, exchange: str, queue: str, proxy: Proxy
) -> None:
    class LosesConfirmation(producer.Producer):  # type: ignore[name-defined,misc]
        """Loses its connection before it sees its first confirmation, and then finds a queue bound to the exchange."""

        returned = 0

        def on_confirm(self, frame: Any) -> None:
            if self.returned:
                super().on_confirm(frame)
                return
            self.returned = len(self.unroutable)
            with broker.connect() as connection:
                connection.channel().queue_declare(queue)
                connection.channel().queue_bind(queue, exchange)
            assert proxy.cut() == 1

    publisher = LosesConfirmation(producer.parse(["--url", proxy.url, "-e", exchange, "-t", "fanout"]))

    assert publisher.publish([b"one"]) == 0

    assert publisher.returned == 1
    assert broker.take(queue) == [b"one"]
    publisher.close()


def test_connections_have_a_name(start: Start, own_broker: Broker, queue: str) -> None:
    consumer = start("consumer", "-q", queue)

    named = f"consumer.py on .*, process {consumer.process.pid}"

    eventually(lambda: re.search(named, own_broker.ctl("list_connections", "client_properties")))
