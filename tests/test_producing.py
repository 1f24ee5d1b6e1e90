"""What the producer publishes, and what it says about it."""

from __future__ import annotations

import json
import re
import signal
import time
from types import ModuleType
from typing import Any

import pytest

from broker import Broker, eventually
from conftest import SCRIPTS, Run, Start
from proxy import Proxy

FULL = (
    "import json\ndef handle(method, properties, body): print(json.dumps({**vars(properties), 'body': body.decode()}))"
)


def test_each_argument_is_a_message(run: Run, queue: str, broker: Broker) -> None:
    run("producer", "-q", queue, "one", "two words", "", "\udcff\udcfe")
    run("producer", "-q", queue, "--", "-v")

    bodies = broker.take(queue)

    assert bodies == [b"one", b"two words", b"", b"\xff\xfe", b"-v"]


def test_empty_input_is_no_message(run: Run, queue: str) -> None:
    assert run("producer", "-q", queue, "-", input=b"").messages == ["0 messages published"]


def test_a_message_has_an_id_a_time_a_type_and_is_persistent(run: Run, queue: str) -> None:
    run("producer", "-q", queue, "-H", "a=1=2", "-H", "b=", "--content-type", "text/csv", "one", "two")

    first, second = (json.loads(line) for line in run("consumer", "-q", queue, "--drain", handle=FULL).bodies)

    assert first["headers"] == {"a": "1=2", "b": ""}
    assert (first["content_type"], first["delivery_mode"], first["body"]) == ("text/csv", 2, "one")
    assert abs(first["timestamp"] - time.time()) < 3600
    assert first["message_id"] != second["message_id"]


def test_a_typed_line_arrives_while_the_producer_waits(start: Start, queue: str) -> None:
    producer, consumer = start("producer", "-q", queue, "-"), start("consumer", "-q", queue)

    for count in 1, 2, 3:
        producer.write(b"line\n")
        eventually(lambda count=count: len(consumer.bodies) == count)  # type: ignore[misc]

    assert producer.end() == 0
    assert consumer.stop() == 0


def test_what_no_queue_takes_is_counted_and_ends_with_1(run: Run, queue: str, exchange: str, broker: Broker) -> None:
    run("consumer", "-e", exchange, "-t", "direct", "-q", queue, "-r", "bound", "--drain")

    run("producer", "-e", exchange, "-r", "bound", "one")
    unroutable = run("producer", "-e", exchange, "-r", "other", "-", input=b"two\n" * 3000, code=1)

    assert unroutable.messages == ["error: 3000 of 3000 messages were unroutable: no queue is bound for them"]
    assert broker.take(queue) == [b"one"]


def test_a_program_publishes_with_keys_and_properties(run: Run, publisher: Any, queue: str) -> None:
    assert publisher.publish([b"one", b"two"]) == 0
    assert publisher.publish([b"three"], routing_key="no-such-queue") == 1
    assert publisher.publish([b"four"], message_id="order-4", headers={"n": 4}) == 0
    with pytest.raises(ValueError):
        publisher.publish([b"five", b"six"], message_id="only one of them would be counted as unroutable")
    with pytest.raises(TypeError):
        publisher.publish("seven")  # which would be five messages

    *others, last = (json.loads(line) for line in run("consumer", "-q", queue, "--drain", handle=FULL).bodies)

    assert [message["body"] for message in others] == ["one", "two"]
    assert (last["body"], last["message_id"], last["headers"]) == ("four", "order-4", {"n": 4})


def test_a_message_that_cannot_be_sent_does_not_disturb_the_next(publisher: Any, queue: str, broker: Broker) -> None:
    bad: list[object] = [b"one", 2]

    with pytest.raises(AttributeError):
        publisher.publish(bad)
    assert publisher.publish([b"three"]) == 0

    assert broker.take(queue) in ([b"three"], [b"one", b"three"])


def test_a_cut_connection_loses_nothing(start: Start, hasty_queue: str, proxy: Proxy) -> None:
    ids = "def handle(method, properties, body): print(properties.message_id, body.decode())"
    producer = start("producer", "-q", hasty_queue, "-", url=proxy.url)
    consumer = start("consumer", "-q", hasty_queue, "--prefetch", "100", handle=ids, url=proxy.url)

    for number in range(1, 4):
        handled = len(consumer.bodies)
        producer.write(b"".join(b"%d\n" % (number * 4000 + line) for line in range(4000)))
        eventually(lambda handled=handled: len(consumer.bodies) > handled)  # type: ignore[misc]
        proxy.cut()

    assert producer.end() == 0, producer.stderr
    assert producer.messages[-1] == "12000 messages published"
    eventually(lambda: len({line.split()[1] for line in consumer.bodies}) == 12_000)
    assert consumer.stop() == 0
    assert len({line.split()[0] for line in consumer.bodies}) == 12_000  # what came twice has the same id
    for script in producer, consumer:
        assert script.tries


def test_scripts_give_up_when_the_timeout_is_over(start: Start) -> None:
    producer, consumer = (start(name, "--timeout", "2.5", url="amqp://127.0.0.1:1") for name in SCRIPTS)

    for script in producer, consumer:
        assert script.end() == 1
        *tries, last = script.messages
        assert 2 <= len(script.tries) == len(tries)
        assert max(script.tries) > 1.5 * script.tries[0]  # pauses grow
        assert sum(script.tries) < 3  # and the last one is cut
        assert all("127.0.0.1:1: connection refused; start a broker with: docker compose up" in line for line in tries)
        assert last.startswith("error: 127.0.0.1:1: connection refused")
    assert producer.messages[-1].endswith("; 0 messages are safe")


def test_a_publish_gives_up_and_the_next_one_works(
    producer: ModuleType, queue: str, proxy: Proxy, broker: Broker
) -> None:
    publisher = producer.Producer(producer.parse(["--url", proxy.url, "-q", queue, "--timeout", "1"]))
    publisher.publish([b"one"])

    proxy.refuse()
    with pytest.raises(producer.ERRORS):
        publisher.publish([b"two"])
    proxy.listen()
    publisher.publish([b"three"])

    publisher.close()
    assert broker.take(queue) == [b"one", b"three"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_producer_says_how_much_is_safe(
    start: Start, run: Run, queue: str, broker: Broker, number: signal.Signals
) -> None:
    producer = start("producer", "-q", queue, "-", input=b"".join(b"%d\n" % line for line in range(500_000)))
    eventually(lambda: broker.depth(queue) > 2000)

    assert producer.stop(number) == 130

    (line,) = producer.messages
    match = re.fullmatch(r"error: interrupted; (\d+) messages are safe", line)
    assert match
    safe = int(match[1])
    got = {int(body) for body in run("consumer", "-q", queue, "--drain", "--prefetch", "300").bodies}
    assert 0 < safe < 500_000
    assert set(range(safe)) <= got
