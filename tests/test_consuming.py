"""When a message is acknowledged, comes again, or moves to NAME.dead; and how the consumer stops."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections import Counter

import pytest

import consumer as consumer_module
from broker import Broker, eventually
from conftest import HANDLE, Gate, Run, Start, UntilConsuming
from proxy import Proxy

LIMIT = 3
# A queue that gives up sooner than the scripts' own.
SHORT = f"""
consumer.QUEUE_ARGUMENTS.update({{"x-delivery-limit": {LIMIT}, "x-delayed-retry-min": 200}})
"""
FAILING = f"""{SHORT}
def handle(method, properties, body):
    os.write(1, body + b"\\n")
    if body.startswith(b"bad"):
        raise ValueError("broken\\nin two lines")
"""
SLOW = """
def handle(method, properties, body):
    os.write(1, body + b"\\n")
    time.sleep(float(body))
"""


def test_a_message_is_acknowledged_after_it_was_handled(
    start: Start, run: Run, queue: str, broker: Broker, gate: Gate
) -> None:
    run("producer", "-q", queue, "one")
    waiting = f"def handle(method, properties, body):\n    os.write(1, b'begun\\n')\n    {gate.statement}"

    first = start("consumer", "-q", queue, handle=waiting)
    eventually(lambda: first.bodies == [b"begun"])
    first.process.kill()
    second = start("consumer", "-q", queue, handle=waiting)
    eventually(lambda: second.bodies == [b"begun"])
    gate.open()

    assert second.stop() == 0
    assert broker.depth(queue) == 0
    assert run("consumer", "-q", queue, "--drain").bodies == []


def test_a_handler_slower_than_the_heartbeat_keeps_its_connection(
    start: Start, run: Run, queue: str, broker: Broker
) -> None:
    run("producer", "-q", queue, "3.5", "3.6", "0", "0", "0")

    consumer = start("consumer", "-q", queue, "--prefetch", "4", handle=SLOW, url=f"{broker.url}?heartbeat=1")
    eventually(lambda: consumer.bodies == [b"3.5", b"3.6"])

    # The fifth fits in the prefetch when the first is acknowledged: soon, not after the second.
    eventually(lambda: broker.depth(queue) == 0, timeout=3)
    assert consumer.bodies == [b"3.5", b"3.6"]
    eventually(lambda: consumer.bodies == [b"3.5", b"3.6", b"0", b"0", b"0"])
    assert (consumer.stop(), consumer.stderr) == (0, "")
    assert broker.depth(queue) == 0


def test_what_fails_is_tried_again_then_moved_to_dead(start: Start, run: Run, queue: str, broker: Broker) -> None:
    run("consumer", "-q", queue, "--drain", handle=FAILING)  # declares the queue
    run("producer", "-q", queue, "one", "bad", "two", "bad too", "three")

    consumer = start("consumer", "-q", queue, handle=FAILING)
    eventually(lambda: broker.depth(f"{queue}.dead") == 2, what=consumer.stderr)

    assert consumer.stop() == 0
    again = LIMIT + 1
    assert Counter(consumer.bodies) == {b"one": 1, b"two": 1, b"three": 1, b"bad": again, b"bad too": again}
    assert broker.depth(queue) == 0
    lines = consumer.stderr.splitlines()
    assert len(lines) == 2 * again
    for line in lines:
        assert re.fullmatch(r"consumer\.py: error: message '[0-9a-f]{32}': ValueError\('broken\\nin two lines'\)", line)
    assert sorted(run("consumer", "-q", f"{queue}.dead", "--drain").bodies) == [b"bad", b"bad too"]


WRONG = {
    "async": "async def handle(method, properties, body): pass",
    "a generator": "def handle(method, properties, body): yield",
    "returns something": "def handle(method, properties, body): return True",
    "takes something else": "def handle(body): pass",
}


@pytest.mark.parametrize("handle", WRONG.values(), ids=WRONG)
def test_a_wrong_handler_acknowledges_nothing(run: Run, queue: str, broker: Broker, handle: str) -> None:
    run("consumer", "-q", queue, "--drain", handle=SHORT + handle)  # declares the queue
    run("producer", "-q", queue, "one", "two")

    consumer = run("consumer", "-q", queue, "--count", "1", handle=SHORT + handle)

    assert "TypeError" in consumer.stderr
    eventually(lambda: broker.depth(queue) == 2)


def test_a_handler_that_exits_leaves_its_message_in_the_queue(run: Run, queue: str) -> None:
    run("producer", "-q", queue, "one", "two", "three")
    exiting = "def handle(method, properties, body):\n    if body == b'two': sys.exit('enough')\n    os.write(1, body)"

    consumer = run("consumer", "-q", queue, handle=exiting, code=1)

    assert (consumer.stdout, consumer.stderr) == (b"one", "enough\n")
    assert run("consumer", "-q", queue, "--drain").bodies == [b"two", b"three"]


def test_count_takes_so_many_and_leaves_the_others(run: Run, queue: str) -> None:
    run("producer", "-q", queue, *"123456789")

    assert run("consumer", "-q", queue, "--count", "4").bodies == [b"1", b"2", b"3", b"4"]

    assert run("consumer", "-q", queue, "--drain").bodies == [b"5", b"6", b"7", b"8", b"9"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_stopped_consumer_finishes_one_and_gives_back_the_others(
    start: Start, run: Run, queue: str, broker: Broker, number: signal.Signals
) -> None:
    run("producer", "-q", queue, "0.5", "0", "0.0")
    consumer = start("consumer", "-q", queue, handle=SLOW)
    eventually(lambda: consumer.bodies == [b"0.5"])

    assert consumer.stop(number) == 0

    assert (consumer.bodies, consumer.stderr) == ([b"0.5"], "")
    verbose = run("consumer", "-q", queue, "--drain", "-v")
    assert verbose.bodies == [b"0", b"0.0"]
    if broker.version() >= (4, 3):  # 3.10 counts what is given back, too
        assert "x-delivery-count" not in verbose.stderr


def test_a_second_control_c_ends_a_handler_that_takes_forever(start: Start, run: Run, queue: str) -> None:
    run("producer", "-q", queue, "600")
    consumer = start("consumer", "-q", queue, handle=SLOW)
    eventually(lambda: consumer.bodies == [b"600"])

    def ended() -> bool:
        consumer.process.send_signal(signal.SIGINT)
        return consumer.process.poll() is not None

    eventually(ended)

    assert consumer.end() == 130


OUTPUTS = {
    "print": ("def handle(method, properties, body): print(body.decode())", ""),
    "print more than the buffer holds": (
        "def handle(method, properties, body): print(body.decode().ljust(20_000))",
        "",
    ),
    "print without a buffer": ("def handle(method, properties, body): print(body.decode())", "1"),
    "write": (HANDLE, ""),
}


@pytest.mark.parametrize(("handle", "unbuffered"), OUTPUTS.values(), ids=OUTPUTS)
def test_output_that_fails_stops_the_consumer(start: Start, run: Run, queue: str, handle: str, unbuffered: str) -> None:
    run("producer", "-q", queue, "one", "two")
    env = {"PYTHONUNBUFFERED": unbuffered}
    reader, writer = os.pipe()
    os.close(reader)

    closed = start("consumer", "-q", queue, handle=handle, env=env, stdout=writer)
    assert (closed.end(), closed.stderr) == (0, "")
    with open("/dev/full", "wb") as device:
        full = start("consumer", "-q", queue, handle=handle, env=env, stdout=device)
    assert full.end() == 1

    os.close(writer)
    assert re.fullmatch(r"consumer\.py: error: message '\w+': OSError\(28, 'No space left on device'\)\n", full.stderr)
    assert run("consumer", "-q", queue, "--drain").bodies == [b"one", b"two"]


def test_a_pipe_of_the_handler_that_breaks_is_a_failure(run: Run, queue: str, broker: Broker) -> None:
    run("producer", "-q", queue, "one")
    broken = "def handle(method, properties, body): raise BrokenPipeError"

    consumer = run("consumer", "-q", queue, "--count", "1", handle=broken)

    assert "BrokenPipeError()" in consumer.stderr
    eventually(lambda: broker.depth(queue) == 1)


def test_what_was_in_hand_when_the_connection_broke_comes_again(
    start: Start, run: Run, queue: str, proxy: Proxy, gate: Gate
) -> None:
    run("producer", "-q", queue, "one", "two")
    waiting = f"def handle(method, properties, body):\n    os.write(1, body + b'\\n')\n    {gate.statement}"
    consumer = start("consumer", "-q", queue, handle=waiting, url=proxy.url)
    eventually(lambda: consumer.bodies == [b"one"])

    proxy.cut()
    eventually(lambda: "next try in" in consumer.stderr)
    gate.open()

    eventually(lambda: set(consumer.bodies) == {b"one", b"two"})
    assert consumer.stop() == 0
    assert run("consumer", "-q", queue, "--drain").bodies == []


def test_a_deleted_queue_is_declared_again(
    start: Start, run: Run, queue: str, broker: Broker, until_consuming: UntilConsuming
) -> None:
    consumer = start("consumer", "-q", queue)
    until_consuming(queue)

    with broker.connect() as connection:
        connection.channel().queue_delete(queue)
    until_consuming(queue)
    run("producer", "-q", queue, "one")

    eventually(lambda: consumer.bodies == [b"one"])
    assert consumer.stop() == 0
    assert re.fullmatch(r"consumer\.py: .*cancelled: queue deleted.*; next try in .* s\n", consumer.stderr)


def test_a_queue_that_exists_is_used_as_it_is(run: Run, queue: str, broker: Broker) -> None:
    with broker.connect() as connection:
        connection.channel().queue_declare(queue, durable=True)

    producer = run("producer", "-q", queue, "one")
    consumer = run("consumer", "-q", queue, "--drain")

    assert consumer.bodies == [b"one"]
    warning = f"warning: the queue is used as it is: PRECONDITION_FAILED - inequivalent arg .* for queue '{queue}' .*"
    assert re.fullmatch(rf"producer\.py: {warning}\nproducer\.py: 1 message published\n", producer.stderr)
    assert re.fullmatch(rf"consumer\.py: {warning}\n", consumer.stderr)


def test_a_consumer_runs_in_a_thread(run: Run, queue: str, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[bytes] = []
    monkeypatch.setattr(consumer_module, "handle", lambda method, properties, body: bodies.append(body))
    consumer = consumer_module.Consumer(consumer_module.parse(["--url", broker.url, "-q", queue]))
    thread = threading.Thread(target=consumer.run)
    thread.start()

    run("producer", "-q", queue, "one", "two")
    eventually(lambda: bodies == [b"one", b"two"])
    consumer.stop()
    thread.join(timeout=60)

    assert not thread.is_alive()
    assert broker.depth(queue) == 0
