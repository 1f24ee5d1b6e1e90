"""The ends: signals, --count, --drain, and a standard output that is closed or full."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import time
from typing import Any, Callable, Iterator

import pytest

import consumer
from broker import Broker, ContainerBroker, LocalBroker, eventually, free_ports
from conftest import Run, Script, Start, UntilConsuming

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
SLOW = """
def handle(method, properties, body):
    os.write(1, body + b"\\n")
    time.sleep(2)
"""
MARKED = """
def handle(method, properties, body):
    attempts = (properties.headers or {}).get("x-delivery-count", 0)
    os.write(1, f"{body.decode()} {method.redelivered} {attempts}\\n".encode())
    time.sleep(0.001)
"""


def stop(script: Script, number: signal.Signals = signal.SIGTERM, timeout: float = 20) -> int:
    """Send the signal, with standard input left open, and return the exit code."""
    script.process.send_signal(number)
    return script.process.wait(timeout)


def numbers(count: int) -> bytes:
    return b"".join(b"%d\n" % number for number in range(count))


@pytest.mark.long
def test_a_message_is_handled_once_by_a_consumer_that_is_stopped_again_and_again(
    start: Start, run: Run, queue: str, broker: Broker, rng: random.Random
) -> None:
    run("producer", "-q", queue, "-", input=numbers(12_000))

    handled: list[bytes] = []
    for _ in range(50):
        consumer = start("consumer", "-q", queue, "--prefetch", "100", handle=MARKED)
        eventually(lambda consumer=consumer: consumer.bodies or consumer.process.poll() is not None)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.2))
        assert stop(consumer, rng.choice([signal.SIGINT, signal.SIGTERM]), timeout=10) == 0
        assert consumer.stderr == ""
        handled += consumer.bodies
    stopped = len(handled)
    handled += run("consumer", "-q", queue, "--drain", "--prefetch", "100", handle=MARKED).bodies

    assert stopped < len(handled)
    fields = [line.split() for line in handled]
    assert sorted(int(body) for body, _, _ in fields) == list(range(12_000))
    if broker.version() >= (4, 3):  # older ones count what is given back
        assert {attempts for _, _, attempts in fields} == {b"0"}


@SIGNALS
def test_an_idle_consumer_stops(
    start: Start, queue: str, until_consuming: UntilConsuming, number: signal.Signals
) -> None:
    consumer = start("consumer", "-q", queue)
    until_consuming(queue)

    assert stop(consumer, number) == 0

    assert consumer.stderr == ""


@SIGNALS
def test_a_stopped_consumer_finishes_the_message_in_hand_and_gives_back_the_others(
    start: Start, run: Run, queue: str, broker: Broker, number: signal.Signals
) -> None:
    run("producer", "-q", queue, "one", "two", "three")
    consumer = start("consumer", "-q", queue, handle=SLOW)
    eventually(lambda: consumer.bodies == [b"one"])

    assert stop(consumer, number) == 0

    assert consumer.bodies == [b"one"]
    assert consumer.stderr == ""
    assert broker.depth(queue) == 2
    assert run("consumer", "-q", queue, "--drain").bodies == [b"two", b"three"]


def test_background_jobs_of_a_shell_go_on_after_control_c(
    start: Start, queue: str, until_consuming: UntilConsuming
) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    producer, consumer = (
        start(name, "-q", queue, *rest, preexec_fn=ignore) for name, *rest in (["producer", "-"], ["consumer"])
    )
    until_consuming(queue)
    producer.write(b"one\n")
    eventually(lambda: consumer.bodies == [b"one"])

    producer.process.send_signal(signal.SIGINT)
    consumer.process.send_signal(signal.SIGINT)
    producer.write(b"two\n")

    assert producer.end() == 0
    eventually(lambda: consumer.bodies == [b"one", b"two"])
    assert stop(consumer) == 0


@SIGNALS
def test_a_signal_that_comes_twice_at_once_counts_once(
    run: Run, queue: str, broker: Broker, number: signal.Signals
) -> None:
    handle = f"""
import signal
def handle(method, properties, body):
    for _ in range(2):  # as `timeout` does
        os.kill(os.getpid(), {number:d})
        while not signal.getsignal({number:d}).__self__.stopping: time.sleep(0.001)
    time.sleep(0.2)
    os.write(1, body + b"\\n")
"""
    run("producer", "-q", queue, "one")

    consumer = run("consumer", "-q", queue, handle=handle)

    assert consumer.bodies == [b"one"]
    assert broker.depth(queue) == 0


def test_a_signal_interrupts_the_wait_for_a_broker_once() -> None:
    waiting = consumer.Consumer(consumer.parse([]))
    waiting.interruptible = True

    with pytest.raises(KeyboardInterrupt):
        waiting.stop()

    waiting.stop()  # while the first one is dealt with


@SIGNALS
def test_a_second_signal_ends_a_handler_that_takes_forever(
    start: Start, run: Run, queue: str, number: signal.Signals
) -> None:
    run("producer", "-q", queue, "one")
    forever = "def handle(method, properties, body):\n    os.write(1, b'one\\n')\n    time.sleep(600)"
    consumer = start("consumer", "-q", queue, handle=forever)
    eventually(lambda: consumer.bodies == [b"one"])

    def stopped() -> bool:
        consumer.process.send_signal(number)
        return consumer.process.poll() is not None

    eventually(stopped, timeout=10)

    assert consumer.end() == 130
    rest = start("consumer", "-q", queue, "-c", "1")
    assert rest.end() == 0
    assert rest.bodies == [b"one"]


@pytest.fixture(params=["a broker that is down", "a mute port"])
def nowhere(request: pytest.FixtureRequest) -> Iterator[tuple[str, Callable[[Script], object]]]:
    """A URL where no broker answers, and what a script does when it has tried it."""
    if request.param == "a mute port":
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(30)
            yield f"amqp://127.0.0.1:{server.getsockname()[1]}", lambda script: server.accept()
    else:
        yield f"amqp://127.0.0.1:{free_ports(1)[0]}", lambda script: eventually(lambda: "next try" in script.stderr)


@SIGNALS
def test_a_consumer_without_a_broker_stops(
    start: Start, nowhere: tuple[str, Callable[[Script], object]], number: signal.Signals
) -> None:
    url, until_tried = nowhere
    consumer = start("consumer", url=url)
    until_tried(consumer)

    assert stop(consumer, number) == 0

    assert all("next try" in line for line in consumer.stderr.splitlines())


@SIGNALS
def test_a_producer_without_a_broker_stops_and_says_that_nothing_is_safe(
    start: Start, nowhere: tuple[str, Callable[[Script], object]], number: signal.Signals
) -> None:
    url, until_tried = nowhere
    producer = start("producer", "-", url=url)
    until_tried(producer)

    assert stop(producer, number) == 130

    *tries, last = producer.stderr.splitlines()
    assert last == "producer.py: error: interrupted; 0 messages are safe, resume with: tail -n +1"
    assert all("next try" in line for line in tries)


def safe(producer: Script) -> int:
    """How many messages the last line of an interrupted producer calls safe."""
    last = producer.stderr.splitlines()[-1]
    match = re.fullmatch(
        r"producer\.py: error: interrupted; (\d+) messages are safe, resume with: tail -n \+(\d+)", last
    )
    assert match, producer.stderr
    assert int(match[2]) == int(match[1]) + 1
    return int(match[1])


@SIGNALS
def test_an_interrupted_producer_says_how_many_lines_are_safe(
    start: Start, run: Run, queue: str, broker: Broker, number: signal.Signals
) -> None:
    lines = [b"%0100d" % number for number in range(200_000)]
    producer = start("producer", "-q", queue, "-", input=b"\n".join(lines))
    eventually(lambda: broker.depth(queue) > 2000)

    assert stop(producer, number) == 130
    resumed = run("producer", "-q", queue, "-", input=b"\n".join(lines[safe(producer) : safe(producer) + 10]))

    assert producer.stderr.count("\n") == 1
    assert 0 < safe(producer) < len(lines)
    assert resumed.stderr == "producer.py: 10 messages published\n"
    bodies = run("consumer", "-q", queue, "--drain", "--prefetch", "300").bodies
    assert broker.depth(queue) == 0
    assert set(lines[: safe(producer) + 10]) <= set(bodies)


@SIGNALS
def test_an_interrupted_idle_producer_says_that_its_lines_are_safe(
    start: Start, queue: str, broker: Broker, number: signal.Signals
) -> None:
    producer = start("producer", "-q", queue, "-")
    for count, line in enumerate([b"one\n", b"two\n", b"three\n"], 1):  # one is sent when those before are confirmed
        producer.write(line)
        eventually(lambda count=count: broker.depth(queue) == count)  # type: ignore[misc]

    assert stop(producer, number) == 130

    assert safe(producer) in (2, 3)
    assert producer.stderr.count("\n") == 1


def test_an_interrupted_producer_says_exactly_what_is_safe(start: Start, queue: str, broker: Broker) -> None:
    arguments = {"x-queue-type": "quorum", "x-max-length": 3, "x-overflow": "reject-publish"}
    with broker.connect() as connection:
        connection.channel().queue_declare(queue, durable=True, arguments=arguments)
    producer = start("producer", "-q", queue, "-")
    for count in range(1, 10):
        producer.write(b"%d\n" % count)
        eventually(lambda count=count: broker.depth(queue) == count or "rejected" in producer.stderr)  # type: ignore[misc]

    assert stop(producer) == 130

    assert "rejected" in producer.stderr
    assert safe(producer) == broker.depth(queue) > 0


def test_a_producer_that_is_interrupted_twice_says_what_is_safe_nevertheless(
    start: Start, queue: str, broker: Broker
) -> None:
    producers = [start("producer", "-q", queue, "-") for _ in range(5)]
    for producer in producers:
        producer.write(b"one\n")
    eventually(lambda: broker.depth(queue) == len(producers))

    for producer in producers:
        producer.process.send_signal(signal.SIGINT)
        assert stop(producer, signal.SIGTERM) in (130, -signal.SIGTERM)  # that it may get when Python has all but ended

    for producer in producers:
        assert safe(producer) in (0, 1)
        assert producer.stderr.count("\n") == 1


@pytest.fixture(params=["outage", "memory alarm"])
def trouble(request: pytest.FixtureRequest, broker: ContainerBroker | LocalBroker) -> Iterator[Callable[[], object]]:
    """Makes the broker stop answering a publisher."""
    if request.param == "outage":
        yield broker.freeze
        broker.thaw()
    else:
        yield lambda: broker.ctl("set_vm_memory_high_watermark", "0")
        broker.ctl("set_vm_memory_high_watermark", "0.4")


@pytest.mark.ours
@SIGNALS
def test_a_producer_that_the_broker_does_not_answer_stops_and_says_what_is_safe(
    start: Start, queue: str, broker: Broker, trouble: Callable[[], object], number: signal.Signals
) -> None:
    producer = start("producer", "-q", queue, "-")
    for count, line in enumerate([b"one\n", b"two\n"], 1):
        producer.write(line)
        eventually(lambda count=count: broker.depth(queue) == count)  # type: ignore[misc]

    trouble()
    producer.write(numbers(100))
    waits = "blocks publishers", "no answer for 10 s"
    eventually(lambda: any(wait in producer.stderr for wait in waits), what="the producer waits for the broker")

    assert stop(producer, number) == 130
    assert 2 <= safe(producer) < 102


COUNTS = {
    "less than the prefetch": (2, 10, 5),
    "the prefetch": (3, 3, 5),
    "more than the prefetch": (5, 2, 8),
    "one": (1, 300, 3),
    "all": (5, 10, 5),
}


# Slow means that those before are acknowledged meanwhile, for which the broker could send others.
@pytest.mark.parametrize("handle", [MARKED, SLOW.replace("2", "0.3")], ids=["fast", "slow"])
@pytest.mark.parametrize(("count", "prefetch", "published"), COUNTS.values(), ids=COUNTS)
def test_count_takes_that_many_and_leaves_the_others_in_the_queue(
    run: Run, queue: str, broker: Broker, handle: str, count: int, prefetch: int, published: int
) -> None:
    run("producer", "-q", queue, *map(str, range(published)))

    consumer = run("consumer", "-q", queue, "-c", str(count), "--prefetch", str(prefetch), handle=handle)

    assert [int(line.split()[0]) for line in consumer.bodies] == list(range(count))
    assert broker.depth(queue) == published - count
    rest = [line.decode().split() for line in run("consumer", "-q", queue, "--drain", handle=MARKED).bodies]
    assert [int(body) for body, _, _ in rest] == list(range(count, published))
    assert all(redelivered == "False" for _, redelivered, _ in rest)


def test_count_waits_for_as_many_messages(start: Start, run: Run, queue: str) -> None:
    run("producer", "-q", queue, "one", "two")
    consumer = start("consumer", "-q", queue, "-c", "3")
    eventually(lambda: consumer.bodies == [b"one", b"two"])
    with pytest.raises(subprocess.TimeoutExpired):
        consumer.process.wait(1)

    run("producer", "-q", queue, "three", "four")

    assert consumer.end() == 0
    assert consumer.bodies == [b"one", b"two", b"three"]


@pytest.mark.ours
def test_count_is_reached_across_an_outage(start: Start, run: Run, queue: str, broker: Broker) -> None:
    run("producer", "-q", queue, *"12345")
    consumer = start("consumer", "-q", queue, "-c", "3", handle=SLOW)
    eventually(lambda: consumer.bodies == [b"1"])

    broker.ctl("close_all_connections", "maintenance")

    assert consumer.end(timeout=60) == 0
    rest = run("consumer", "-q", queue, "--drain").bodies
    assert len(consumer.bodies) == 3
    assert set(consumer.bodies) | set(rest) == {b"1", b"2", b"3", b"4", b"5"}


def test_drain_of_an_empty_queue_ends_at_once(run: Run, queue: str) -> None:
    consumer = run("consumer", "-q", queue, "--drain")

    assert consumer.stdout == b""
    assert consumer.stderr == ""


def test_drain_does_not_wait_for_what_another_consumer_holds(
    start: Start, run: Run, queue: str, broker: Broker
) -> None:
    run("producer", "-q", queue, *"12345")
    slow = SLOW.replace("2", "5")
    holder = start("consumer", "-q", queue, "--prefetch", "3", handle=slow)
    eventually(lambda: holder.bodies == [b"1"] and broker.depth(queue) == 2)

    assert run("consumer", "-q", queue, "--drain").bodies == [b"4", b"5"]

    assert stop(holder) == 0
    assert run("consumer", "-q", queue, "--drain").bodies == [b"2", b"3"]


def test_drain_leaves_a_failed_message_that_waits_for_its_next_try(run: Run, queue: str, broker: Broker) -> None:
    handle = """
consumer.QUEUE_ARGUMENTS["x-delayed-retry-min"] = 60000
def handle(method, properties, body):
    if body == b"bad" and not method.redelivered:
        raise ValueError
    os.write(1, body + b"\\n")
"""
    run("consumer", "-q", queue, "--drain", handle=handle)  # declares the queue
    run("producer", "-q", queue, "one", "bad", "two")

    consumer = run("consumer", "-q", queue, "--drain", handle=handle)

    # RabbitMQ 4.3 does not count a message that waits for its next try; older ones have none wait.
    expected = [b"one", b"two"] if broker.version() >= (4, 3) else [b"bad", b"one", b"two"]
    assert sorted(consumer.bodies) == expected
    assert consumer.stderr.count("failed: ValueError()") == consumer.stderr.count("\n") == 1


PRINTING = """
def handle(method, properties, body):
    print(body.decode())
"""
HANDLERS = {
    "its own": "",
    "print": PRINTING,
    "print and flush": PRINTING.replace("decode()", "decode(), flush=True"),
    "print much": PRINTING.replace("decode()", "decode().ljust(20_000)"),
    "print to what was stdout before": PRINTING.replace("def", "out = sys.stdout\ndef").replace(
        "decode()", "decode(), file=out"
    ),
    "print and ignore errors": PRINTING.replace("    print", "    with contextlib.suppress(Exception): print"),
}


def outputs(test: Any) -> Any:
    """Run the test with all handlers, and with and without Python's buffer."""
    test = pytest.mark.parametrize("env", [{"PYTHONUNBUFFERED": ""}, {"PYTHONUNBUFFERED": "1"}], ids=["", "-u"])(test)
    return pytest.mark.parametrize("handle", HANDLERS.values(), ids=HANDLERS)(test)


@outputs
def test_a_closed_output_stops_the_consumer_in_silence(
    start: Start, run: Run, queue: str, broker: Broker, handle: str, env: dict[str, str]
) -> None:
    run("producer", "-q", queue, "one")
    consumer = start("consumer", "-q", queue, stdout=subprocess.PIPE, handle=handle, env=env)
    assert consumer.process.stdout
    assert consumer.process.stdout.readline().rstrip() == b"one"

    consumer.process.stdout.close()
    run("producer", "-q", queue, "two", "three")

    assert consumer.end(timeout=20) == 0
    assert consumer.stderr == ""
    assert broker.depth(queue) == 2
    assert run("consumer", "-q", queue, "--drain").bodies == [b"two", b"three"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
@outputs
def test_a_full_disk_stops_the_consumer_with_the_reason(
    start: Start, run: Run, queue: str, broker: Broker, handle: str, env: dict[str, str]
) -> None:
    run("producer", "-q", queue, "one", "two")

    with open("/dev/full", "wb") as full:
        consumer = start("consumer", "-q", queue, stdout=full, handle=handle, env=env)

    assert consumer.end(timeout=20) == 1
    assert consumer.stderr == f"consumer.py: error: standard output: {os.strerror(28)}\n"
    assert broker.depth(queue) == 2
    assert run("consumer", "-q", queue, "--drain").bodies == [b"one", b"two"]
