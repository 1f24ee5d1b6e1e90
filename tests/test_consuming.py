"""When a message is acknowledged, comes again, or moves to NAME.dead; and how the consumer stops."""

from __future__ import annotations

import re
import signal
import threading
from collections import Counter
from types import ModuleType

import pytest

from broker import Broker, eventually
from conftest import HASTY, Gate, Publish, Run, Start, UntilConsuming
from proxy import Proxy

FAILING = f"""
QUEUE_ARGUMENTS.update({HASTY})
def handle(method, properties, body):
    os.write(1, body + b"\\n")
    if body.startswith(b"bad"):
        raise ValueError("broken\\nin two lines")
    if body == b"never":
        raise Reject("useless")
"""
SLOW = """
def handle(method, properties, body):
    os.write(1, body + b"\\n")
    time.sleep(float(body))
"""


def test_a_message_is_acknowledged_after_it_was_handled(
    start: Start, hasty_queue: str, broker: Broker, gate: Gate, publish: Publish
) -> None:
    publish(hasty_queue, "one")
    waiting = f"def handle(method, properties, body):\n    os.write(1, b'begun\\n')\n    {gate.statement}"

    first = start("consumer", "-q", hasty_queue, handle=waiting)
    eventually(lambda: first.bodies == [b"begun"])
    first.process.kill()
    second = start("consumer", "-q", hasty_queue, handle=waiting)
    eventually(lambda: second.bodies == [b"begun"])
    gate.open()

    assert second.stop() == 0
    assert broker.depth(hasty_queue) == 0
    assert broker.take(hasty_queue) == []


def test_a_handler_slower_than_the_heartbeat_keeps_its_connection(
    start: Start, queue: str, broker: Broker, publish: Publish, gate: Gate
) -> None:
    slow = f"""
def handle(method, properties, body):
    os.write(1, body + b"\\n")
    if body == b"slow":
        time.sleep(3.2)
    if body == b"endless":
        {gate.statement}
"""
    publish(queue, "slow", "endless", "three", "four", "five")

    consumer = start("consumer", "-q", queue, "--prefetch", "4", handle=slow, url=f"{broker.url}?heartbeat=1")
    eventually(lambda: consumer.bodies == [b"slow", b"endless"])

    # The fifth fits in the prefetch when the first is acknowledged, which does not wait for the second.
    eventually(lambda: broker.depth(queue) == 0, timeout=10)
    gate.open()
    eventually(lambda: consumer.bodies == [b"slow", b"endless", b"three", b"four", b"five"])
    assert (consumer.stop(), consumer.stderr) == (0, "")
    assert broker.depth(queue) == 0


def test_what_fails_is_tried_again_then_moved_to_dead(
    start: Start, hasty_queue: str, broker: Broker, publish: Publish
) -> None:
    publish(hasty_queue, "one", "bad", "two", "bad too", "three")

    consumer = start("consumer", "-q", hasty_queue, handle=FAILING)
    eventually(lambda: broker.depth(f"{hasty_queue}.dead") == 2, what=consumer.stderr)

    assert consumer.stop() == 0
    assert Counter(consumer.bodies) == {b"one": 1, b"two": 1, b"three": 1, b"bad": 3, b"bad too": 3}
    assert broker.depth(hasty_queue) == 0
    assert len(consumer.messages) == 6
    for line in consumer.messages:
        assert re.fullmatch(r"error: message '[0-9a-f]{32}': ValueError\('broken\\nin two lines'\)", line)
    assert sorted(broker.take(f"{hasty_queue}.dead")) == [b"bad", b"bad too"]


def test_what_is_rejected_moves_to_dead_at_once(run: Run, hasty_queue: str, broker: Broker, publish: Publish) -> None:
    publish(hasty_queue, "one", "never", "two")

    consumer = run("consumer", "-q", hasty_queue, "--count", "3", handle=FAILING)

    assert consumer.bodies == [b"one", b"never", b"two"]
    (line,) = consumer.messages
    assert re.fullmatch(r"error: message '[0-9a-f]{32}': Reject\('useless'\)", line)
    eventually(lambda: broker.depth(f"{hasty_queue}.dead") == 1)
    assert broker.depth(hasty_queue) == 0


def test_a_consumer_of_dead_letters_keeps_what_it_rejects(
    run: Run, hasty_queue: str, broker: Broker, publish: Publish
) -> None:
    publish(hasty_queue, "never")
    run("consumer", "-q", hasty_queue, "--count", "1", handle=FAILING)
    eventually(lambda: broker.depth(f"{hasty_queue}.dead") == 1)

    run("consumer", "-q", f"{hasty_queue}.dead", "--count", "2", handle=FAILING)

    eventually(lambda: broker.depth(f"{hasty_queue}.dead") == 1)


def test_a_private_queue_is_not_stopped_by_what_fails(start: Start, run: Run, exchange: str, queue: str) -> None:
    consumer = start("consumer", "-e", exchange, "-t", "fanout", "--prefetch", "10", handle=FAILING)
    run("consumer", "-e", exchange, "-t", "fanout", "-q", queue, "--drain")
    eventually(lambda: run("producer", "-e", exchange, "first") and b"first" in consumer.bodies)

    run("producer", "-e", exchange, *[f"bad {number}" for number in range(30)], "never", "last")

    eventually(lambda: consumer.stderr.count("is dropped") == 31)
    assert consumer.stop() == 0
    bodies = Counter(consumer.bodies)
    assert {bodies[b"bad %d" % number] for number in range(30)} == {2}
    assert bodies[b"never"] == bodies[b"last"] == 1


WRONG = {
    "async": "async def handle(method, properties, body): pass",
    "a generator": "def handle(method, properties, body): yield",
    "returns something": "def handle(method, properties, body): return True",
}


@pytest.mark.parametrize("handle", WRONG.values(), ids=WRONG)
def test_a_handler_that_returns_something_ends_the_program(
    run: Run, queue: str, broker: Broker, handle: str, publish: Publish
) -> None:
    publish(queue, "one", "two")

    consumer = run("consumer", "-q", queue, handle=handle, code=1)

    assert "error: handle must return None" in consumer.stderr
    eventually(lambda: broker.depth(queue) == 2)


def test_a_handler_that_exits_leaves_its_message_in_the_queue(
    run: Run, queue: str, publish: Publish, broker: Broker
) -> None:
    publish(queue, "one", "two", "three")
    exiting = "def handle(method, properties, body):\n    if body == b'two': sys.exit('enough')\n    os.write(1, body)"

    consumer = run("consumer", "-q", queue, handle=exiting, code=1)

    assert (consumer.stdout, consumer.stderr) == (b"one", "enough\n")
    assert broker.take(queue) == [b"two", b"three"]


def test_count_takes_so_many_and_leaves_the_others(run: Run, queue: str, publish: Publish, broker: Broker) -> None:
    publish(queue, *"123456789")

    assert run("consumer", "-q", queue, "--count", "4").bodies == [b"1", b"2", b"3", b"4"]

    assert broker.take(queue) == [b"5", b"6", b"7", b"8", b"9"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_stopped_consumer_finishes_one_and_gives_back_the_others(
    start: Start, run: Run, queue: str, broker: Broker, number: signal.Signals, publish: Publish
) -> None:
    publish(queue, "0.5", "0", "0.0")
    consumer = start("consumer", "-q", queue, handle=SLOW)
    eventually(lambda: consumer.bodies == [b"0.5"])

    assert consumer.stop(number) == 0

    assert (consumer.bodies, consumer.stderr) == ([b"0.5"], "")
    verbose = run("consumer", "-q", queue, "--drain", "-v")
    assert verbose.bodies == [b"0", b"0.0"]
    if broker.version() >= (4, 3):  # 3.10 counts what is given back, too
        assert "x-delivery-count" not in verbose.stderr


def test_a_stop_in_a_backlog_costs_the_others_no_try(run: Run, queue: str, publish: Publish) -> None:
    bodies = [str(number) for number in range(500)]
    publish(queue, *bodies)
    stopping = """
def handle(method, properties, body):
    os.write(1, body + b"\\n")
    if body == b"75":
        os.kill(os.getpid(), signal.SIGTERM)
"""

    stopped = run("consumer", "-q", queue, "--prefetch", "100", handle=stopping)  # when the broker is sending the next
    rest = run("consumer", "-q", queue, "--drain")

    # RabbitMQ 4.3 would deliver what is rejected ten seconds later. 3.10 gives back in any order.
    assert {body.encode() for body in bodies}.difference(stopped.bodies, rest.bodies) == set()


def test_a_second_control_c_ends_a_handler_that_takes_forever(start: Start, queue: str, publish: Publish) -> None:
    publish(queue, "600")
    consumer = start("consumer", "-q", queue, handle=SLOW)
    eventually(lambda: consumer.bodies == [b"600"])

    def ended() -> bool:
        consumer.process.send_signal(signal.SIGINT)
        return consumer.process.poll() is not None

    eventually(ended)

    assert consumer.end() == 130


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_output_that_fails_is_a_failure_of_its_message(
    start: Start, hasty_queue: str, broker: Broker, publish: Publish, unbuffered: str
) -> None:
    of_its_own = "raise BrokenPipeError", "raise OSError(28, 'No space left on device')"
    publish(hasty_queue, *of_its_own, "print('short')", "print('longer than the buffer' * 1000)")
    handle = "def handle(method, properties, body): exec(body)"

    with open("/dev/full", "wb") as device:
        arguments = ["-q", hasty_queue, "--count", "4"]
        consumer = start("consumer", *arguments, handle=handle, stdout=device, env={"PYTHONUNBUFFERED": unbuffered})
        consumer.end()

    failures = re.findall(r"error: message '\w+': (\w+)", consumer.stderr)
    assert failures == ["BrokenPipeError", "OSError", "OSError", "OSError"]
    eventually(lambda: broker.depth(hasty_queue) == 4)


def test_what_was_in_hand_when_the_connection_broke_comes_again(
    start: Start, hasty_queue: str, proxy: Proxy, gate: Gate, publish: Publish, broker: Broker
) -> None:
    publish(hasty_queue, "one", "two")
    waiting = f"def handle(method, properties, body):\n    os.write(1, body + b'\\n')\n    {gate.statement}"
    consumer = start("consumer", "-q", hasty_queue, handle=waiting, url=proxy.url)
    eventually(lambda: consumer.bodies == [b"one"])

    proxy.cut()
    eventually(lambda: "next try in" in consumer.stderr)
    gate.open()

    eventually(lambda: set(consumer.bodies) == {b"one", b"two"})
    assert consumer.stop() == 0
    assert broker.take(hasty_queue) == []


def test_a_deleted_queue_is_declared_again(
    start: Start, queue: str, broker: Broker, until_consuming: UntilConsuming, publish: Publish
) -> None:
    consumer = start("consumer", "-q", queue)
    until_consuming(queue)

    with broker.connect() as connection:
        connection.channel().queue_delete(queue)
    until_consuming(queue)
    publish(queue, "one")

    eventually(lambda: consumer.bodies == [b"one"])
    assert consumer.stop() == 0
    (line,) = consumer.messages
    assert re.search("consumer cancelled: queue deleted.*; next try in", line)


def test_a_queue_that_exists_is_used_as_it_is(run: Run, queue: str, broker: Broker) -> None:
    with broker.connect() as connection:
        connection.channel().queue_declare(queue, durable=True)

    producer = run("producer", "-q", queue, "one")
    consumer = run("consumer", "-q", queue, "--drain")

    assert consumer.bodies == [b"one"]
    warning = f"warning: the queue is used as it is: PRECONDITION_FAILED - inequivalent arg .* for queue '{queue}' .*"
    (said,) = consumer.messages
    assert re.fullmatch(warning, said)
    assert re.fullmatch(warning, producer.messages[0])
    assert producer.messages[1:] == ["1 message published"]


def test_a_consumer_runs_in_a_thread(
    queue: str, broker: Broker, consumer: ModuleType, monkeypatch: pytest.MonkeyPatch, publish: Publish
) -> None:
    bodies: list[bytes] = []
    monkeypatch.setattr(consumer, "handle", lambda method, properties, body: bodies.append(body))
    worker = consumer.Consumer(consumer.parse(["--url", broker.url, "-q", queue]))
    thread = threading.Thread(target=worker.run)
    thread.start()

    publish(queue, "one", "two")
    eventually(lambda: bodies == [b"one", b"two"])
    worker.stop()
    thread.join(timeout=60)

    assert not thread.is_alive()
    assert broker.depth(queue) == 0
