"""Faults of the broker and of the network: each message is accounted for; none is lost, and few come twice."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Iterator

import pika
import pytest

import producer
from broker import Broker, eventually
from cluster import Cluster, cluster_for
from conftest import SCRIPTS, Depth, Gate, Run, Script, Start
from producer import BATCH_SIZE
from proxy import Proxy

LINE = 64  # bytes
PREFETCH = 10  # messages that the consumer has in hand at most
COUNTING = """
calls = 0
def handle(method, properties, body):
    global calls
    calls += 1
    print(calls, flush=True)
"""
HANDLE = "def handle(method, properties, body): print(properties.message_id, body.decode())"


def lines(first: int, last: int) -> bytes:
    return b"".join(b"%0*d\n" % (LINE - 1, number) for number in range(first, last + 1))


def tries(script: Script) -> list[float]:
    """The waits that the script announced, one line a try. It says nothing else, but that it waits, and how it ended."""
    last = (" message published", " messages published", "most of the nodes that have the queue, well?")
    said = [line for line in script.stderr.splitlines() if not line.endswith(last)]
    waits = [
        re.fullmatch(r"(?:producer|consumer)\.py: [^;]+; (?:[^;]+; )?next try in (\d\.\d) s", line) for line in said
    ]
    assert all(waits), script.stderr
    return [float(wait[1]) for wait in waits if wait]


class Handled:
    """What consumers with HANDLE have written: the number and the message id of each message."""

    def __init__(self) -> None:
        self.consumers: list[Script] = []

    @property
    def count(self) -> int:
        return sum(consumer.stdout.count(b"\n") for consumer in self.consumers)

    @property
    def messages(self) -> list[tuple[int, bytes]]:
        pairs = [line.split() for consumer in self.consumers for line in consumer.bodies]
        return [(int(number), message_id) for message_id, number in pairs]

    @property
    def numbers(self) -> list[int]:
        return [number for number, _ in self.messages]

    def until(self, count: int) -> None:
        eventually(lambda: self.count >= count, what=f"{count} messages handled")


class Stream:
    """Numbered lines through a producer and a consumer, fifty every `pause` seconds, until it is ended."""

    def __init__(self, start: Start, queue: str, url: str = "", pause: float = 0.01) -> None:
        self.start, self.queue, self.url, self.pause = start, queue, url, pause
        self.sent = 0
        self.handled = Handled()
        self.consumer = start("consumer", "-q", queue, handle=HANDLE, url=url)
        self.handled.consumers.append(self.consumer)
        self.producer = start("producer", "-q", queue, "-", url=url)
        self.ended = threading.Event()
        self.feeder = threading.Thread(target=self.feed, daemon=True)
        self.feeder.start()

    def feed(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            while not self.ended.wait(self.pause):
                self.producer.write(lines(self.sent + 1, self.sent + 50))
                self.sent += 50

    def flow(self, more: int) -> None:
        """Return when that many more messages have been handled."""
        try:
            self.handled.until(self.handled.count + more)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.producer.stderr}\n{self.consumer.stderr}") from None

    def end(self) -> None:
        self.ended.set()
        self.feeder.join(timeout=120)
        assert not self.feeder.is_alive(), self.producer.stderr

    def account(self, depth: Depth, faults: int) -> None:
        """All that was sent was confirmed and handled; what came twice was in flight at one of the faults."""
        self.end()
        assert self.producer.end() == 0, self.producer.stderr
        assert self.producer.stderr.splitlines()[-1] == f"producer.py: {self.sent} messages published"
        with contextlib.suppress(AssertionError):  # what is missing is said below
            eventually(lambda: len(set(self.handled.numbers)) == self.sent, timeout=20)
        assert self.consumer.terminate() == 0, self.consumer.stderr

        rest = self.start("consumer", "-q", self.queue, "--drain", handle=HANDLE, url=self.url)
        self.handled.consumers.append(rest)
        assert rest.end() == 0, rest.stderr

        messages = self.handled.messages
        lost = sorted(set(range(1, self.sent + 1)).difference(self.handled.numbers))
        assert not lost, f"{len(lost)} of {self.sent} confirmed messages are lost: {lost[0]} to {lost[-1]}"
        assert len(set(messages)) == self.sent  # what came twice had the same message id
        assert len(messages) - self.sent <= faults * (BATCH_SIZE + PREFETCH)
        eventually(lambda: depth(self.queue) == 0)
        assert depth(f"{self.queue}.dead") == 0


@pytest.fixture
def proxy(broker: Broker) -> Iterator[Proxy]:
    proxy = Proxy(broker.url)
    yield proxy
    proxy.refuse()


@pytest.fixture(autouse=True)
def running_again(broker: Broker, queue: str) -> Iterator[None]:
    """A test that fails while the broker is down is the only one to fail."""
    yield
    try:
        broker.connect().close()
    except Exception:
        broker.start()


@pytest.mark.ours
@pytest.mark.long
@pytest.mark.parametrize("faults", [["kill", "kill"], ["stop"]], ids=["killed twice", "stopped in order"])
def test_nothing_is_lost_when_the_broker_is(
    faults: list[str], broker: Any, start: Start, queue: str, depth: Depth, rng: random.Random
) -> None:
    stream = Stream(start, queue)

    for fault in faults:
        stream.flow(rng.randint(1000, 5000))
        getattr(broker, fault)()
        broker.start()
    stream.flow(1000)

    stream.account(depth, faults=len(faults))
    for script in stream.producer, stream.consumer:
        assert len(tries(script)) >= len(faults)
        assert max(tries(script)) <= 5


@pytest.mark.ours
@pytest.mark.long
def test_scripts_that_start_before_the_broker_wait_for_it(broker: Any, start: Start, queue: str) -> None:
    broker.stop()
    producer, consumer = start("producer", "-q", queue), start("consumer", "-q", queue)
    eventually(lambda: len(tries(producer)) > 1 and len(tries(consumer)) > 1)

    broker.start()

    assert producer.end() == 0
    eventually(lambda: consumer.bodies == [b"Hello World!"])
    assert consumer.terminate() == 0
    assert max(tries(producer) + tries(consumer)) <= 5


def test_after_an_outage_a_consumer_takes_its_prefetch_again(
    start: Start, run: Run, queue: str, proxy: Proxy, gate: Gate, depth: Depth
) -> None:
    handle = f"""{COUNTING}
    if calls == 3:
        {gate.statement}
    while calls == 40: time.sleep(0.01)
"""
    run("producer", "-q", queue, *map(str, range(60)))
    consumer = start("consumer", "-q", queue, "--prefetch", "10", handle=handle, url=proxy.url)
    eventually(lambda: consumer.bodies[-1:] == [b"3"])

    proxy.cut()
    eventually(lambda: "next try" in consumer.stderr)
    gate.open()
    eventually(lambda: consumer.bodies[-1:] == [b"40"])

    # Of 60, 39 are done, and 10 in hand; the first three may have come again.
    eventually(lambda: depth(queue) <= 60 - 39 - 10 + 3)


def test_drain_does_not_take_the_wait_for_a_broker_for_an_outage(start: Start, queue: str, proxy: Proxy) -> None:
    proxy.refuse()
    consumer = start("consumer", "-q", queue, "--drain", url=proxy.url)
    eventually(lambda: consumer.stderr.count("next try") > 5)
    tries = consumer.stderr.count("next try")

    proxy.listen()
    eventually(lambda: proxy.lines)

    assert consumer.end(timeout=tries) == 0  # after an outage it would wait for twice as many seconds


def test_a_consumer_that_gave_up_finishes_the_message_in_hand_when_told_to_stop(
    start: Start, run: Run, queue: str, proxy: Proxy, gate: Gate
) -> None:
    run("producer", "-q", queue, "one")
    handle = f"""
def handle(method, properties, body):
    print("begun", flush=True)
    {gate.statement}
    print("done")
"""
    consumer = start("consumer", "-q", queue, "--connect-timeout", "0", handle=handle, url=proxy.url)
    eventually(lambda: consumer.bodies == [b"begun"])
    proxy.refuse()
    eventually(lambda: consumer.stderr)

    consumer.process.send_signal(signal.SIGTERM)
    gate.open()

    assert consumer.end() == 1
    assert consumer.bodies == [b"begun", b"done"]
    assert re.fullmatch(r"consumer\.py: error: 127.*\n", consumer.stderr)


def test_the_connect_timeout_of_a_consumer_begins_anew_with_each_outage(
    start: Start, run: Run, queue: str, proxy: Proxy
) -> None:
    run("producer", "-q", queue, "one", "two")
    handle = "def handle(method, properties, body): os.write(1, body + b'\\n'); time.sleep(3)"
    proxy.refuse()
    consumer = start("consumer", "-q", queue, "--connect-timeout", "1", handle=handle, url=proxy.url)
    eventually(lambda: tries(consumer))
    over = time.monotonic() + 1
    proxy.listen()
    eventually(lambda: consumer.bodies == [b"one"])

    eventually(lambda: time.monotonic() > over)  # while the first is in hand
    proxy.cut()

    eventually(lambda: consumer.bodies == [b"one", b"two"], what=consumer.stderr)
    assert consumer.terminate() == 0


TWINS: dict[str, dict[str, Any]] = {
    "another routing key": {"routing_key": "cancelled"},
    "another body": {"body": b"changed"},
    "another header": {"headers": {"op": "delete"}},
    "another type": {"type": "cancelled"},
}


def test_what_was_in_hand_when_the_connection_broke_is_handled_once(
    start: Start, run: Run, queue: str, proxy: Proxy, gate: Gate
) -> None:
    run("producer", "-q", queue, "one", "two")
    handle = f"""
def handle(method, properties, body):
    print(body.decode(), flush=True)
    {gate.statement}
"""
    consumer = start("consumer", "-q", queue, handle=handle, url=proxy.url)
    eventually(lambda: consumer.bodies == [b"one"])

    proxy.cut()
    eventually(lambda: tries(consumer))
    gate.open()

    eventually(lambda: b"two" in consumer.bodies)
    assert consumer.terminate() == 0
    assert consumer.bodies == [b"one", b"two"]
    assert run("consumer", "-q", queue, "--drain").bodies == []


@pytest.mark.parametrize("second", TWINS.values(), ids=TWINS)
def test_a_message_that_comes_again_after_an_outage_is_not_taken_for_another_with_its_id(
    start: Start, run: Run, queue: str, exchange: str, broker: Broker, proxy: Proxy, gate: Gate,
    second: dict[str, Any],
) -> None:  # fmt: skip
    handle = f"""{COUNTING}
    if calls == 2:
        {gate.statement}
        raise ValueError
"""
    # With a prefetch of one, the second comes when the first has been acknowledged.
    arguments = ["-e", exchange, "-t", "topic", "-q", queue, "--prefetch", "1"]
    run("consumer", *arguments, "--drain")
    first: dict[str, Any] = {"routing_key": "created", "body": b"order", "headers": {"op": "create"}, "type": "created"}
    with broker.connect() as connection:
        for message in first, {**first, **second}:
            key, body = message.pop("routing_key"), message.pop("body")
            properties = pika.BasicProperties(message_id="order-1", **message)
            connection.channel().basic_publish(exchange, key, body, properties)
    consumer = start("consumer", *arguments, handle=handle, url=proxy.url)
    eventually(lambda: consumer.bodies == [b"1", b"2"])

    proxy.cut()
    eventually(lambda: "next try" in consumer.stderr)
    gate.open()

    eventually(lambda: consumer.bodies == [b"1", b"2", b"3"], timeout=20)
    assert consumer.terminate() == 0


def test_drain_goes_on_after_an_outage(start: Start, run: Run, queue: str, proxy: Proxy) -> None:
    run("producer", "-q", queue, *"12345")
    handle = "def handle(method, properties, body): os.write(1, body + b'\\n'); time.sleep(0.1)"

    consumer = start("consumer", "-q", queue, "--drain", handle=handle, url=proxy.url)
    eventually(lambda: consumer.bodies)

    proxy.cut()  # with all that is left in hand

    assert consumer.end() == 0
    assert set(consumer.bodies) == {b"1", b"2", b"3", b"4", b"5"}


def test_an_input_that_ends_during_an_outage_is_published_if_nothing_is_left(
    start: Start, queue: str, depth: Depth, proxy: Proxy
) -> None:
    producer = start("producer", "-q", queue, "-", url=proxy.url)
    eventually(lambda: depth(queue) == 0, what="it is connected")

    proxy.refuse()
    eventually(lambda: len(tries(producer)) > 1)

    assert producer.end() == 0
    assert producer.stderr.splitlines()[-1] == "producer.py: 0 messages published"


@pytest.mark.ours
@pytest.mark.long
def test_the_connect_timeout_of_a_producer_begins_anew_after_a_connection_that_lasted(
    broker: Any, start: Start, queue: str
) -> None:
    producer = start("producer", "-q", queue, "-", "--connect-timeout", "1")
    eventually(lambda: broker.depth(queue) == 0, what="it is connected")

    broker.ctl("set_vm_memory_high_watermark", "0.00001")
    try:
        producer.write(b"one\n")
        for count in 1, 2:
            eventually(lambda count=count: producer.stderr.count("no answer for 10 s") == count)  # type: ignore[misc]
            broker.ctl("close_all_connections", "maintenance")
        eventually(lambda: producer.stderr.count("next try") == 2)
    finally:
        broker.ctl("set_vm_memory_high_watermark", "0.4")

    assert producer.end() == 0, producer.stderr


@pytest.mark.ours
def test_a_limit_of_connections_is_waited_for(broker: Any, start: Start, run: Run, queue: str) -> None:
    broker.ctl("set_vhost_limits", "-p", "/", '{"max-connections": 0}')
    try:
        scripts = [start(name, "-q", queue) for name in SCRIPTS]
        for script in scripts:
            eventually(lambda script=script: "connection limit" in script.stderr)  # type: ignore[misc]
            assert script.process.poll() is None
    finally:
        broker.ctl("clear_vhost_limits", "-p", "/")

    assert scripts[0].end() == 0
    eventually(lambda: scripts[1].bodies == [b"Hello World!"])
    assert scripts[1].terminate() == 0


@pytest.mark.long
def test_nothing_is_lost_when_the_connection_is_cut_twenty_times(
    start: Start, queue: str, depth: Depth, proxy: Proxy, rng: random.Random
) -> None:
    stream = Stream(start, queue, url=proxy.url)

    stream.flow(1)
    cuts = lines_cut = 0
    while cuts < 20:
        time.sleep(rng.uniform(0, 0.5))  # a moment that is random, not one that something is waited for
        cut = proxy.cut()
        cuts += cut > 0
        lines_cut += cut

    stream.account(depth, faults=lines_cut)
    assert tries(stream.producer)
    assert tries(stream.consumer)


@pytest.mark.long
def test_nothing_is_lost_when_the_lines_in_use_go_mute(start: Start, queue: str, depth: Depth, proxy: Proxy) -> None:
    stream = Stream(start, queue, url=f"{proxy.url}?heartbeat=2")
    stream.flow(2000)

    proxy.mute()

    for script in stream.producer, stream.consumer:
        eventually(lambda script=script: tries(script), timeout=30)  # type: ignore[misc]
    stream.flow(1000)
    stream.account(depth, faults=1)
    assert len(tries(stream.producer)) == len(tries(stream.consumer)) == 1


@pytest.mark.long
def test_an_idle_line_that_goes_mute_is_replaced(start: Start, queue: str, proxy: Proxy) -> None:
    producer = start("producer", "-q", queue, "-", url=f"{proxy.url}?heartbeat=2")
    consumer = start("consumer", "-q", queue)
    producer.write(b"one\n")
    eventually(lambda: consumer.bodies == [b"one"])

    proxy.mute()

    eventually(lambda: tries(producer), timeout=30, what="the mute line is noticed")
    producer.write(b"two\n")
    eventually(lambda: consumer.bodies == [b"one", b"two"])
    assert producer.end() == 0
    assert len(tries(producer)) == 1
    assert consumer.terminate() == 0


@pytest.mark.ours
@pytest.mark.long
def test_nothing_is_lost_when_the_broker_freezes(broker: Any, start: Start, queue: str, depth: Depth) -> None:
    stream = Stream(start, queue, url=f"{broker.url}?heartbeat=2")
    stream.flow(2000)

    broker.freeze()
    try:
        for script in stream.producer, stream.consumer:
            eventually(lambda script=script: tries(script), timeout=30)  # type: ignore[misc]
    finally:
        broker.thaw()

    stream.flow(1000)
    stream.account(depth, faults=1)


ALARMS = {
    "memory": ("set_vm_memory_high_watermark", "0.00001", "0.4"),
    "disk": ("set_disk_free_limit", "1000000GB", "50MB"),
}


@pytest.mark.ours
@pytest.mark.parametrize("alarm", ALARMS)
def test_an_alarm_is_waited_for(alarm: str, broker: Any, start: Start, run: Run, queue: str, depth: Depth) -> None:
    setting, raised, cleared = ALARMS[alarm]
    run("producer", "-q", queue, "-", input=lines(1, 300))

    broker.ctl(setting, raised)
    try:
        producer = start("producer", "-q", queue, "-", input=lines(301, 3000))
        eventually(lambda: producer.stderr)
        consumer = run("consumer", "-q", queue, "-c", "300")
        assert producer.process.poll() is None
        [warning] = producer.stderr.splitlines()
    finally:
        broker.ctl(setting, cleared)

    assert warning == f"producer.py: the broker blocks publishers: low on {alarm}"
    assert consumer.stdout == lines(1, 300)
    assert producer.end() == 0
    assert producer.stderr == f"{warning}\nproducer.py: 2700 messages published\n"
    assert run("consumer", "-q", queue, "--drain").stdout == lines(301, 3000)
    assert depth(queue) == 0


@pytest.fixture
def full_queue(broker: Broker, queue: str) -> str:
    """A queue that refuses what is published when it has a hundred messages."""
    arguments = {"x-queue-type": "quorum", "x-max-length": 100, "x-overflow": "reject-publish"}
    with broker.connect() as connection:
        connection.channel().queue_declare(queue, durable=True, arguments=arguments)
    return queue


def test_a_full_queue_is_waited_for(start: Start, full_queue: str, depth: Depth) -> None:
    producer = start("producer", "-q", full_queue, "-", input=lines(1, 1000))
    eventually(lambda: "next try" in producer.stderr, timeout=20)
    handled = Handled()

    consumer = start("consumer", "-q", full_queue, handle=HANDLE)
    handled.consumers.append(consumer)

    assert producer.end() == 0, producer.stderr
    *said, last = producer.stderr.splitlines()
    assert last == "producer.py: 1000 messages published"
    assert len([line for line in said if "warning: " in line]) == 1
    assert all("full" in line for line in said if "next try" in line)
    eventually(lambda: set(handled.numbers) == set(range(1, 1001)))
    assert len(set(handled.messages)) == 1000
    eventually(lambda: depth(full_queue) == 0)
    assert consumer.terminate() == 0


def test_a_producer_that_gives_up_on_a_full_queue_says_how_much_is_safe(run: Run, full_queue: str) -> None:
    producer = run("producer", "-q", full_queue, "-", "--connect-timeout", "1", input=lines(1, 1000), code=1)

    match = re.search(r"(\d+) messages are safe, resume with: tail -n \+(\d+)$", producer.stderr)
    assert match
    safe = int(match[1])
    assert int(match[2]) == safe + 1
    numbers = [int(body) for body in run("consumer", "-q", full_queue, "--drain").bodies]
    assert set(numbers) >= set(range(1, safe + 1))
    assert "full" in producer.stderr.splitlines()[-1]


@pytest.mark.long
def test_what_a_killed_producer_published_has_no_gap(start: Start, run: Run, queue: str, rng: random.Random) -> None:
    for _ in range(3):
        stream = Stream(start, queue)
        stream.flow(rng.randint(1, 5000))

        stream.producer.kill()
        stream.end()

        stream.consumer.terminate()
        numbers = stream.handled.numbers + [int(body) for body in run("consumer", "-q", queue, "--drain").bodies]
        assert sorted(numbers) == list(range(1, len(numbers) + 1))
        assert len(numbers) <= stream.sent


class Breaking(producer.Producer):
    """Loses its connection, and the broker for good, with the first confirmation."""

    def on_confirm(self, frame: Any) -> None:
        super().on_confirm(frame)
        self.options.url = producer.broker_urls("amqp://127.0.0.1:1")
        self.close_reasons.append(pika.exceptions.StreamLostError("with it"))


def test_what_was_confirmed_before_the_connection_broke_needs_no_other(broker: Broker, queue: str) -> None:
    sender = Breaking(producer.parse(["--url", broker.url, "-q", queue, "--connect-timeout", "0"]))

    assert sender.publish([sender.message(b"one")]) == 0

    assert sender.safe == 1


class Flapping(producer.Producer):
    """Loses its connection with each confirmation."""

    def send(self, size: int) -> None:
        super().send(1)

    def on_confirm(self, frame: Any) -> None:
        super().on_confirm(frame)
        self.close_reasons.append(pika.exceptions.StreamLostError("again"))


def test_the_time_to_connect_begins_anew_with_each_confirmation(broker: Broker, queue: str, depth: Depth) -> None:
    sender = Flapping(producer.parse(["--url", broker.url, "-q", queue, "--connect-timeout", "1"]))

    assert (
        sender.publish([sender.message(b"") for _ in range(15)]) == 0
    )  # pauses for a tenth of a second or two after each

    assert sender.safe == 15


class Counting(producer.Producer):
    most = 0  # messages that were on their way at once

    def on_confirm(self, frame: Any) -> None:
        self.most = max(self.most, len(self.unconfirmed))
        super().on_confirm(frame)


def test_the_connection_is_served_while_any_number_of_messages_is_published(
    broker: Broker, queue: str, depth: Depth
) -> None:
    sender = Counting(producer.parse(["--url", broker.url, "-q", queue]))

    assert sender.publish(sender.message(b"") for _ in range(2 * BATCH_SIZE + 1)) == 0

    assert sender.most == BATCH_SIZE
    assert sender.safe == 2 * BATCH_SIZE + 1
    eventually(lambda: depth(queue) == sender.safe)
    sender.close()


def test_other_messages_take_the_place_of_what_was_given_up(broker: Broker, queue: str) -> None:
    sender = producer.Producer(producer.parse(["--url", "amqp://127.0.0.1:1", "-q", queue, "--connect-timeout", "0"]))
    with pytest.raises(producer.Stop):
        sender.publish([sender.message(b"one"), sender.message(b"two")])

    sender.options.url = producer.broker_urls(broker.url)

    assert (sender.publish([sender.message(b"another")]), sender.safe) == (0, 1)
    sender.close()


def test_the_next_call_without_messages_goes_on_with_what_was_given_up(run: Run, broker: Broker, queue: str) -> None:
    sender = producer.Producer(producer.parse(["--url", "amqp://127.0.0.1:1", "-q", queue, "--connect-timeout", "0"]))
    with pytest.raises(producer.Stop):
        sender.publish([sender.message(b"%d" % number, message_id=f"id-{number}") for number in range(3)])
    with pytest.raises(producer.Stop):
        sender.publish([])

    sender.options.url = producer.broker_urls(broker.url)

    assert (sender.publish([]), sender.safe) == (0, 3)
    sender.close()
    consumer = run("consumer", "-q", queue, "--drain", "-v")
    assert consumer.bodies == [b"0", b"1", b"2"]
    assert re.findall("message id (.*?),", consumer.stderr) == ["id-0", "id-1", "id-2"]


def test_a_message_that_cannot_be_sent_does_not_disturb_the_next(run: Run, broker: Broker, queue: str) -> None:
    sender = producer.Producer(producer.parse(["--url", broker.url, "-q", queue]))
    with pytest.raises(AssertionError):
        sender.publish([sender.message(b"sent or not"), sender.message(b"bad", message_id=2)])

    assert (sender.publish([sender.message(body) for body in (b"1", b"2", b"3")]), sender.safe) == (0, 3)

    sender.close()
    bodies = run("consumer", "-q", queue, "--drain").bodies
    assert [body for body in bodies if body != b"sent or not"] == [b"1", b"2", b"3"]


def test_the_pauses_between_tries_grow_to_five_seconds_and_are_random() -> None:
    first, second = (list(itertools.islice(producer.backoff(math.inf), 20)) for _ in range(2))

    assert max(first[:2]) < 0.5
    assert all(2.5 <= pause <= 5 for pause in first[5:])
    assert first != second


def test_a_producer_that_gave_up_says_where_to_resume(
    start: Start, run: Run, queue: str, depth: Depth, proxy: Proxy, tmp_path: Path, rng: random.Random
) -> None:
    (tmp_path / "file").write_bytes(lines(1, 100_000))
    stdin = (tmp_path / "file").open("rb")
    producer = start("producer", "-q", queue, "-", "--connect-timeout", "1", url=proxy.url, stdin=stdin)
    wanted = rng.randint(BATCH_SIZE + 1, 10_000)
    eventually(lambda: depth(queue) >= wanted)

    proxy.refuse()

    assert producer.end() == 1
    resume = re.search(r": (tail -n \+\d+)$", producer.stderr)
    assert resume, producer.stderr
    rest = subprocess.run(f"{resume[1]} file", shell=True, cwd=tmp_path, stdout=subprocess.PIPE, check=True).stdout
    assert 0 < len(rest) < 100_000 * LINE
    run("producer", "-q", queue, "-", input=rest)
    numbers = [int(body) for body in run("consumer", "-q", queue, "--drain", "--prefetch", "300").bodies]
    assert set(numbers) == set(range(1, 100_001))
    assert len(numbers) - 100_000 <= BATCH_SIZE


@pytest.mark.long
def test_an_idle_producer_stays_connected(start: Start, queue: str, proxy: Proxy) -> None:
    producer = start("producer", "-q", queue, "-", url=f"{proxy.url}?heartbeat=2")
    consumer = start("consumer", "-q", queue)
    producer.write(b"one\n")
    eventually(lambda: consumer.bodies == [b"one"])
    connections = len(proxy.lines)

    time.sleep(9)  # the broker closes a connection that was silent for two heartbeats
    producer.write(b"two\n")

    eventually(lambda: consumer.bodies == [b"one", b"two"])
    assert producer.end() == 0
    assert producer.stderr == "producer.py: 2 messages published\n"
    assert len(proxy.lines) == connections
    assert consumer.terminate() == 0


@pytest.mark.ours
def test_idle_scripts_whose_connections_are_closed_connect_again(broker: Any, start: Start, queue: str) -> None:
    producer, consumer = start("producer", "-q", queue, "-"), start("consumer", "-q", queue)
    producer.write(b"one\n")
    eventually(lambda: consumer.bodies == [b"one"])

    broker.ctl("close_all_connections", "maintenance")
    producer.write(b"two\n")

    eventually(lambda: b"two" in consumer.bodies)
    assert producer.end() == 0
    assert consumer.terminate() == 0
    for script in producer, consumer:
        assert len(tries(script)) == 1
        assert "maintenance" in script.stderr


@pytest.mark.long
def test_nothing_is_lost_when_consumers_are_killed_again_and_again(
    start: Start, run: Run, queue: str, depth: Depth, rng: random.Random
) -> None:
    run("producer", "-q", queue, "-", input=lines(1, 5000))
    handled = Handled()
    handle = f"{HANDLE}; time.sleep(0.001)"  # so that there is something left for each

    for _ in range(10):
        handled.consumers.append(start("consumer", "-q", queue, handle=handle))
        handled.until(handled.count + rng.randint(1, 200))
        handled.consumers[-1].kill()
    last = start("consumer", "-q", queue, handle=handle)
    handled.consumers.append(last)

    eventually(lambda: len(set(handled.numbers)) == 5000)
    assert last.terminate() == 0
    assert set(handled.numbers) == set(range(1, 5001))
    assert len(handled.numbers) - 5000 <= 10 * PREFETCH
    eventually(lambda: depth(queue) == 0)
    assert depth(f"{queue}.dead") == 0


@pytest.mark.long
def test_a_count_is_kept_when_the_connection_is_cut(
    start: Start, run: Run, queue: str, proxy: Proxy, rng: random.Random
) -> None:
    run("producer", "-q", queue, "-", input=lines(1, 3000))
    consumer = start("consumer", "-q", queue, "-c", "2000", handle=HANDLE, url=proxy.url)
    handled = Handled()
    handled.consumers.append(consumer)

    for _ in range(5):
        handled.until(handled.count + rng.randint(1, 200))
        proxy.cut()

    assert consumer.end() == 0
    assert handled.count == 2000


@pytest.fixture(scope="module")
def module_cluster(session_broker: Broker) -> Iterator[Cluster]:
    if not session_broker.ours:
        pytest.skip("needs a broker of its own kind, and --broker URL has none to offer")
    cluster = cluster_for(session_broker)
    try:
        yield cluster
    finally:
        cluster.remove()


@pytest.fixture
def cluster(module_cluster: Cluster) -> Cluster:
    """All nodes run, also after a test that failed while some were down."""
    module_cluster.start()
    return module_cluster


@pytest.mark.ours
@pytest.mark.long
def test_a_cluster_that_loses_a_node_loses_no_message(cluster: Cluster, start: Start, queue: str) -> None:
    stream = Stream(start, queue, url=cluster.url, pause=0.05)  # so that a node that was away can catch up
    stream.flow(2000)
    leader = cluster.leader(queue)
    other = next(node for node in cluster.nodes if node is not leader)

    leader.kill()
    stream.flow(2000)
    leader.start()
    other.stop()
    stream.flow(2000)
    other.start()
    stream.flow(2000)

    stream.account(other.depth, faults=3)


@pytest.mark.ours
@pytest.mark.long
def test_nothing_counts_as_published_while_the_cluster_has_no_majority(
    cluster: Cluster, start: Start, run: Run, queue: str
) -> None:
    run("producer", "-q", queue, "one", url=cluster.url)
    leader = cluster.leader(queue)
    other = next(node for node in cluster.nodes if node is not leader)
    leader.kill()
    other.kill()

    producer = start("producer", "-q", queue, "two", url=cluster.url)
    eventually(lambda: re.search("no answer for 10 s|messages were rejected|next try", producer.stderr))
    assert producer.process.poll() is None
    other.start()  # a majority, without the node that the producer's channel was told is the leader

    assert producer.end() == 0, producer.stderr
    leader.start()
    assert run("consumer", "-q", queue, "--drain", url=cluster.url).bodies == [b"one", b"two"]


@pytest.mark.ours
@pytest.mark.long
def test_a_queue_whose_only_node_is_down_is_waited_for(cluster: Cluster, start: Start, queue: str) -> None:
    home = cluster.nodes[1]
    with home.connect() as connection:
        connection.channel().queue_declare(queue, durable=True, arguments={"x-queue-type": "classic"})
    home.stop()

    producer, consumer = (start(name, "-q", queue, url=cluster.url) for name in SCRIPTS)
    for script in producer, consumer:
        eventually(lambda script=script: re.search("NOT_FOUND - .*; next try", script.stderr))  # type: ignore[misc]
    home.start()

    assert producer.end() == 0, producer.stderr
    eventually(lambda: consumer.bodies == [b"Hello World!"], what=consumer.stderr)
    assert consumer.terminate() == 0
