"""Who gets which message: exchanges, bindings, and consumers that share a queue."""

from __future__ import annotations

import contextlib
import re
import uuid

import pika
import pytest

import producer
from broker import Broker, eventually
from conftest import Depth, Gate, Run, Script, Start, UntilConsuming


class Probe:
    """Marks in the consumers' private queues, which show that these are bound and what came before is there."""

    def __init__(self, broker: Broker, exchange: str) -> None:
        self.broker = broker
        self.exchange = exchange

    def send(self, mark: bytes, bindings: str) -> None:
        """Publish what the last of the bindings (-r KEY ... -H KEY=VALUE ...) matches, if the exchange exists yet."""
        words = bindings.split()
        options = list(zip(words[::2], words[1::2]))
        keys = [re.sub("[*#]", "x", value) for option, value in options if option == "-r"]
        headers = dict(value.split("=") for option, value in options if option == "-H")
        properties = pika.BasicProperties(headers=headers)
        with contextlib.suppress(pika.exceptions.ChannelClosedByBroker), self.broker.connect() as connection:
            channel = connection.channel()
            # Otherwise the broker and the test would close the channel at the same time.
            channel.exchange_declare(self.exchange, passive=True)
            channel.basic_publish(self.exchange, keys[-1] if keys else "", mark, properties)

    def until_bound(self, consumers: dict[str, Script], mark: bytes = b"bound?") -> None:
        def bound() -> bool:
            waiting = [bindings for bindings, consumer in consumers.items() if mark not in consumer.bodies]
            for bindings in waiting:
                assert consumers[bindings].process.poll() is None, consumers[bindings].stderr
                self.send(mark, bindings)
            return not waiting

        eventually(bound, what="the consumers' queues are bound")

    def received(self, consumers: dict[str, Script]) -> dict[str, list[str]]:
        """What each consumer got up to now, without the marks; a queue keeps the order, so nothing is on its way."""
        for bindings in consumers:
            self.send(b"all?", bindings)
        for consumer in consumers.values():
            eventually(lambda consumer=consumer: b"all?" in consumer.bodies)  # type: ignore[misc]
        return {
            bindings: [body.decode() for body in consumer.bodies if not body.endswith(b"?")]
            for bindings, consumer in consumers.items()
        }


@pytest.fixture
def probe(broker: Broker, exchange: str) -> Probe:
    return Probe(broker, exchange)


def unroutable(count: int, of: int) -> str:
    """What the producer says at the end."""
    if count:
        return f"producer.py: error: {count} of {of} messages were unroutable: no queue is bound for them\n"
    return f"producer.py: {of} message{'s' * (of != 1)} published\n"


# Of each exchange: its type, who is sent what (message: producer's options), who gets what (consumer's options:
# messages). What nobody gets is unroutable.
RULES: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {
    "direct: the key is the same": (
        "direct",
        {"1": "-r error", "2": "-r info", "3": "-r error", "4": "-r debug", "5": "", "6": "-r error.disk"},
        {"-r error": "1 3", "-r error -r info": "1 2 3", "-r info": "2"},
    ),
    "direct: without -r the key is empty": (
        "direct",
        {"1": "", "2": "-r error", "3": "-r #"},
        {"": "1", "-r error": "2"},
    ),
    "fanout: everyone, whatever the key": (
        "fanout",
        {"1": "", "2": "-r error", "3": "-H k=v"},
        {"": "1 2 3", "-r other": "1 2 3", "-r a -r b": "1 2 3"},
    ),
    "topic: * is one word": (
        "topic",
        {"1": "-r kern.info", "2": "-r cron.critical", "3": "-r kern.critical", "4": "-r kern", "5": "-r kern.a.b"},
        {"-r kern.*": "1 3", "-r *.critical": "2 3", "-r kern.* -r *.critical": "1 2 3"},
    ),
    "topic: # is any number of words": (
        "topic",
        {"1": "-r a.z", "2": "-r a.b.z", "3": "-r a.b.c.z", "4": "-r a.b", "5": "", "6": "-r az"},
        {"-r a.#.z": "1 2 3", "-r #": "1 2 3 4 5 6", "": "1 2 3 4 5 6", "-r a.*.z": "2"},
    ),
    "topic: a key without wildcards is itself": (
        "topic",
        {"1": "-r a.b", "2": "-r a.b.c", "3": "-r a.*"},
        {"-r a.b": "1"},
    ),
    "headers: all have to match": (
        "headers",
        {"1": "-H a=1", "2": "-H a=1 -H b=2", "3": "-H a=1 -H b=2 -H c=3", "4": "-H a=1 -H b=3", "5": ""},
        {"-H a=1 -H b=2": "2 3", "-H a=1 -H b=2 --match all": "2 3", "-H b=3": "4"},
    ),
    "headers: any has to match": (
        "headers",
        {"1": "-H a=1", "2": "-H a=2 -H b=2", "3": "-H a=2 -H b=3", "4": "-H c=1", "5": "", "6": "-H a=1 -H b=2"},
        {"-H a=1 -H b=2 --match any": "1 2 6", "-H b=3 --match any": "3"},
    ),
    "headers: the routing key is ignored": (
        "headers",
        {"1": "-r x -H a=1", "2": "-r y -H a=1", "3": "-r x -H a=2"},
        {"-r x -H a=1": "1 2", "-r other -H a=1": "1 2"},
    ),
    "headers: without -H everything matches": (
        "headers",
        {"1": "", "2": "-r x", "3": "-H a=1"},
        {"": "1 2 3", "-H a=1": "3"},
    ),
}


@pytest.mark.parametrize("kind, sends, gets", RULES.values(), ids=RULES)
def test_an_exchange_routes_by_the_rules_of_its_type(
    start: Start, exchange: str, probe: Probe, kind: str, sends: dict[str, str], gets: dict[str, str]
) -> None:
    consumers = {bindings: start("consumer", "-e", exchange, "-t", kind, *bindings.split()) for bindings in gets}
    probe.until_bound(consumers)

    senders = {}
    for message, options in sends.items():
        senders[message] = start("producer", "-e", exchange, *options.split(), message, input=b"")
    for message, sender in senders.items():
        lost = not any(message in got.split() for got in gets.values())
        assert (sender.end(), sender.stderr) == (int(lost), unroutable(int(lost), of=1)), message

    received = probe.received(consumers)
    assert {bindings: sorted(got) for bindings, got in received.items()} == {
        bindings: got.split() for bindings, got in gets.items()
    }
    assert [(consumer.terminate(), consumer.stderr) for consumer in consumers.values()] == [(0, "")] * len(consumers)


@pytest.mark.parametrize(
    "kind, options", [("direct", ""), ("fanout", "-r any"), ("topic", "-r any.key"), ("headers", "-H any=1")]
)
def test_an_exchange_that_exists_is_used_without_saying_its_type(
    start: Start, run: Run, broker: Broker, exchange: str, probe: Probe, kind: str, options: str
) -> None:
    with broker.connect() as connection:
        connection.channel().exchange_declare(exchange, kind, durable=False)
    consumers = {"": start("consumer", "-e", exchange)}
    probe.until_bound(consumers)

    run("producer", "-e", exchange, *options.split(), "one", "two")

    assert probe.received(consumers) == {"": ["one", "two"]}


def test_one_producer_to_one_consumer(start: Start, run: Run, queue: str, depth: Depth) -> None:
    consumer = start("consumer", "-q", queue)

    run("producer", "-q", queue, "one", "two", "three")

    eventually(lambda: len(consumer.bodies) == 3)
    assert consumer.terminate() == 0
    assert (consumer.bodies, consumer.stderr) == ([b"one", b"two", b"three"], "")
    assert depth(queue) == 0


def test_consumers_of_one_queue_take_turns(
    start: Start, run: Run, queue: str, until_consuming: UntilConsuming, depth: Depth
) -> None:
    consumers = [start("consumer", "-q", queue) for _ in range(3)]
    until_consuming(queue, 3)

    run("producer", "-q", queue, *"123456789")

    eventually(lambda: sum(len(consumer.bodies) for consumer in consumers) == 9)
    assert [consumer.terminate() for consumer in consumers] == [0, 0, 0]
    assert sorted(body for consumer in consumers for body in consumer.bodies) == [b"%d" % i for i in range(1, 10)]
    assert [len(consumer.bodies) for consumer in consumers] == [3, 3, 3]
    assert depth(queue) == 0


def test_with_prefetch_1_a_slow_consumer_does_not_hold_up_the_others(
    start: Start, run: Run, queue: str, until_consuming: UntilConsuming, depth: Depth, gate: Gate
) -> None:
    handle = f"""
def handle(method, properties, body):
    print("has", body.decode(), flush=True)
    {gate.statement}
    print("done", flush=True)
"""
    slow = start("consumer", "-q", queue, "--prefetch", "1", handle=handle)
    quick = start("consumer", "-q", queue, "--prefetch", "1")
    until_consuming(queue, 2)

    run("producer", "-q", queue, *"12345678")

    eventually(lambda: slow.bodies and len(quick.bodies) == 7, what="the quick consumer does all but one")
    gate.open()
    eventually(lambda: slow.bodies[1:] == [b"done"], what="the slow consumer goes on")
    assert [slow.terminate(), quick.terminate()] == [0, 0]
    assert sorted([slow.bodies[0][len("has ") :], *quick.bodies]) == [b"%d" % number for number in range(1, 9)]
    assert depth(queue) == 0


def test_messages_are_stored_until_a_consumer_comes(run: Run, queue: str, depth: Depth) -> None:
    run("producer", "-q", queue, "one", "two")
    run("producer", "-q", queue, "three")
    assert depth(queue) == 3

    assert run("consumer", "-q", queue, "-c", "3").bodies == [b"one", b"two", b"three"]

    assert depth(queue) == 0


def test_consumers_that_come_later_get_only_the_later_messages(
    start: Start, run: Run, exchange: str, probe: Probe
) -> None:
    first = start("consumer", "-e", exchange, "-t", "fanout")
    probe.until_bound({"": first})
    run("producer", "-e", exchange, "one")

    later = start("consumer", "-e", exchange, "-t", "fanout")
    probe.until_bound({"": later})
    run("producer", "-e", exchange, "two")

    assert probe.received({"": first}) == {"": ["one", "two"]}
    assert probe.received({"": later}) == {"": ["two"]}


def test_a_shared_subscription_divides_messages_and_keeps_them_while_all_are_away(
    start: Start, run: Run, exchange: str, queue: str, until_consuming: UntilConsuming, depth: Depth
) -> None:
    subscription = ["-e", exchange, "-t", "topic", "-q", queue, "-r", "order.*"]
    consumers = [start("consumer", *subscription) for _ in range(2)]
    until_consuming(queue, 2)

    run("producer", "-e", exchange, "-r", "order.new", *"1234")
    eventually(lambda: sum(len(consumer.bodies) for consumer in consumers) == 4)
    assert [consumer.terminate() for consumer in consumers] == [0, 0]
    run("producer", "-e", exchange, "-r", "order.paid", "5", "6")

    assert sorted(body for consumer in consumers for body in consumer.bodies) == [b"1", b"2", b"3", b"4"]
    assert [len(consumer.bodies) for consumer in consumers] == [2, 2]
    assert depth(queue) == 2
    assert run("consumer", *subscription, "--drain").bodies == [b"5", b"6"]


@pytest.mark.ours
def test_a_queue_of_the_same_name_in_another_virtual_host_is_another_queue(
    run: Run, broker: Broker, queue: str, depth: Depth
) -> None:
    vhost = f"pair/{uuid.uuid4().hex[:8]}"
    broker.ctl("add_vhost", vhost)
    broker.ctl("set_permissions", "-p", vhost, "guest", ".*", ".*", ".*")
    other_url = broker.url.replace("/%2F", "/" + vhost.replace("/", "%2F"))

    try:
        run("producer", "-q", queue, "here")
        run("producer", "-q", queue, "there", "and there", url=other_url)

        assert depth(queue) == 1
        assert run("consumer", "-q", queue, "--drain").bodies == [b"here"]
        assert run("consumer", "-q", queue, "--drain", url=other_url).bodies == [b"there", b"and there"]
    finally:
        broker.ctl("delete_vhost", vhost)


@pytest.mark.ours
def test_after_an_outage_a_private_queue_is_new_and_what_was_missed_is_told(
    start: Start, run: Run, broker: Broker, exchange: str, probe: Probe
) -> None:
    bindings = "-r a.* -r b.*"
    consumer = start("consumer", "-e", exchange, "-t", "topic", *bindings.split())
    probe.until_bound({bindings: consumer})
    run("producer", "-e", exchange, "-r", "a.x", "before")
    eventually(lambda: b"before" in consumer.bodies)

    broker.ctl("close_all_connections", "maintenance")
    eventually(lambda: "missed" in consumer.stderr)
    probe.until_bound({bindings: consumer}, mark=b"bound again?")
    run("producer", "-e", exchange, "-r", "a.x", "after")

    assert probe.received({bindings: consumer}) == {bindings: ["before", "after"]}
    outage, warning = consumer.stderr.splitlines()
    assert "maintenance" in outage and "next try in" in outage
    assert warning == "consumer.py: warning: what was sent during the outage is missed, because the queue was private"
    assert consumer.terminate() == 0


@pytest.mark.long
def test_an_exchange_that_is_deleted_is_declared_again_if_its_type_is_known_and_else_is_an_error(
    start: Start, broker: Broker, exchange: str, probe: Probe
) -> None:
    untyped = f"{exchange}-untyped"
    with broker.connect() as connection:
        channel = connection.channel()
        channel.exchange_declare(untyped, "topic", durable=True)
        consumers = [start("consumer", "-e", exchange, "-t", "topic"), start("consumer", "-e", untyped)]
        probe.until_bound({"": consumers[0]})
        Probe(broker, untyped).until_bound({"": consumers[1]})

        channel.exchange_delete(exchange)
        channel.exchange_delete(untyped)

    probe.until_bound({"": consumers[0]}, mark=b"bound again?")
    assert (consumers[0].terminate(), consumers[0].stderr) == (0, "")
    assert consumers[1].end() == 1
    assert f"no exchange '{untyped}' in vhost '/'; -t TYPE declares it" in consumers[1].stderr


def test_verbose_shows_where_a_message_comes_from(
    start: Start, run: Run, exchange: str, queue: str, until_consuming: UntilConsuming
) -> None:
    consumer = start("consumer", "-e", exchange, "-t", "topic", "-q", queue, "-v", "-c", "1")
    until_consuming(queue)

    run("producer", "-e", exchange, "-r", "kern.info", "-H", "host=web1", "body")

    assert consumer.end() == 0
    assert consumer.stdout == b"body\n"
    place = f"exchange '{exchange}', routing key 'kern.info', headers {{'host': 'web1'}}, message id "
    (line,) = [line for line in consumer.stderr.splitlines() if place in line]
    assert re.search(place + "[0-9a-f-]{36}-1, redelivered False$", line)


@pytest.mark.parametrize("kind", ["direct", "fanout", "topic", "headers"])
def test_every_message_of_a_batch_that_is_unroutable_is_counted(run: Run, exchange: str, kind: str) -> None:
    lines = b"".join(b"%d\n" % number for number in range(2500))

    sender = run("producer", "-e", exchange, "-t", kind, "-r", "key", "-H", "a=1", "-", input=lines, code=1)

    assert sender.stderr == unroutable(2500, of=2500)


def test_those_messages_of_a_batch_that_are_unroutable_are_counted(
    run: Run, broker: Broker, exchange: str, queue: str
) -> None:
    run("consumer", "-e", exchange, "-t", "direct", "-q", queue, "-r", "bound", "--drain")
    sender = producer.Producer(producer.parse(["--url", broker.url, "-e", exchange]))

    batch = [sender.message(b"%d" % number, "bound" if number % 3 else "other") for number in range(3000)]

    assert sender.publish(batch) == 1000
    assert sender.publish([sender.message(b"%d" % number, "other") for number in range(10)]) == 10
    assert (sender.safe, sender.unroutable) == (3010, 1010)
    assert len(sender.returned) <= 10  # memory does not grow with what is unroutable
    sender.close()
    got = run("consumer", "-q", queue, "--drain").bodies
    assert got == [b"%d" % number for number in range(3000) if number % 3]


def test_messages_to_a_queue_that_has_been_deleted_are_unroutable(
    start: Start, broker: Broker, queue: str, depth: Depth
) -> None:
    sender = start("producer", "-q", queue, "-")
    sender.write(b"one\n")
    eventually(lambda: depth(queue) == 1)

    with broker.connect() as connection:
        connection.channel().queue_delete(queue)
    sender.write(b"two\nthree\n")

    assert sender.end() == 1
    assert sender.stderr == unroutable(2, of=3)
