"""Who gets which message: the rules of the four types of exchange, shared and private subscriptions, virtual hosts."""

from __future__ import annotations

import uuid
from types import ModuleType

import pytest

from broker import Broker, eventually
from conftest import Publish, Run, Start, UntilConsuming

# Of each exchange: its type, who is sent what (message: producer's options), who gets what (consumer's options:
# messages). What nobody gets is unroutable.
RULES: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {
    "direct: the key is the same": (
        "direct",
        {"1": "-r error", "2": "-r info", "3": "", "4": "-r debug"},
        {"-r error": "1", "-r error -r info": "1 2", "": "3"},
    ),
    "fanout: everyone, whatever the key": (
        "fanout",
        {"1": "", "2": "-r error", "3": "-H k=v"},
        {"": "1 2 3", "-r other": "1 2 3"},
    ),
    "topic: * is one word, # any number": (
        "topic",
        {"1": "-r kern.info", "2": "-r cron.critical", "3": "-r kern", "4": "-r kern.a.b", "5": ""},
        {"-r kern.*": "1", "-r kern.* -r *.critical": "1 2", "-r kern.#": "1 3 4", "": "1 2 3 4 5"},
    ),
    "headers: all or any have to match": (
        "headers",
        {"1": "-H a=1", "2": "-H a=1 -H b=2", "3": "-H b=2 -H c=3", "4": "-r a -H c=3", "5": ""},
        {"-H a=1 -H b=2": "2", "-H a=1 -H b=2 --match any": "1 2 3"},
    ),
}


@pytest.mark.parametrize(("kind", "sends", "gets"), RULES.values(), ids=RULES)
def test_an_exchange_routes_by_the_rules_of_its_type(
    start: Start, producer: ModuleType, broker: Broker, exchange: str, kind: str, sends: dict[str, str],
    gets: dict[str, str],
) -> None:  # fmt: skip
    queues = {options: f"{exchange}-{number}" for number, options in enumerate(gets)}
    bind = ["-e", exchange, "-t", kind, "--drain"]
    consumers = [start("consumer", "-q", queue, *bind, *options.split()) for options, queue in queues.items()]
    assert {consumer.end() for consumer in consumers} == {0}

    send = ["--url", broker.url, "-e", exchange]
    routed = {message for message in sends if producer.main([*send, *sends[message].split(), message]) == 0}

    assert routed == {message for messages in gets.values() for message in messages.split()}
    taken = {options: sorted(broker.take(queue)) for options, queue in queues.items()}
    assert taken == {options: messages.encode().split() for options, messages in gets.items()}
    with broker.connect() as connection:
        for queue in queues.values():
            connection.channel().queue_delete(queue)
            connection.channel().queue_delete(f"{queue}.dead")


def test_consumers_of_one_queue_take_turns(
    start: Start, queue: str, until_consuming: UntilConsuming, publish: Publish
) -> None:
    consumers = [start("consumer", "-q", queue) for _ in range(3)]
    until_consuming(queue, 3)

    publish(queue, *"123456789")

    eventually(lambda: [len(consumer.bodies) for consumer in consumers] == [3, 3, 3])
    assert [consumer.stop() for consumer in consumers] == [0, 0, 0]


def test_every_private_consumer_gets_every_message(start: Start, exchange: str) -> None:
    consumers = [start("consumer", "-e", exchange, "-t", "topic", "-r", "a.*") for _ in range(2)]

    def published() -> bool:
        start("producer", "-e", exchange, "-t", "topic", "-r", "a.b", "one").end()
        return all(consumer.bodies for consumer in consumers)

    eventually(published)

    assert [consumer.stop() for consumer in consumers] == [0, 0]
    assert {body for consumer in consumers for body in consumer.bodies} == {b"one"}


def test_a_shared_subscription_keeps_messages_while_all_are_away(
    run: Run, exchange: str, queue: str, broker: Broker
) -> None:
    subscription = ["-e", exchange, "-t", "topic", "-q", queue, "-r", "order.*", "--drain"]
    run("consumer", *subscription)

    run("producer", "-e", exchange, "-r", "order.paid", "1", "2")

    assert broker.depth(queue) == 2
    assert run("consumer", *subscription).bodies == [b"1", b"2"]


def test_the_same_name_in_another_virtual_host_is_another_queue(
    run: Run, own_broker: Broker, queue: str, publish: Publish, broker: Broker
) -> None:
    vhost = f"pair-{uuid.uuid4().hex[:8]}"
    own_broker.ctl("add_vhost", vhost)
    own_broker.ctl("set_permissions", "-p", vhost, "guest", ".*", ".*", ".*")
    other = own_broker.url.replace("/%2F", f"/{vhost}")

    publish(queue, "here")
    run("producer", "-q", queue, "there", url=other)

    assert broker.take(queue) == [b"here"]
    assert run("consumer", "-q", queue, "--drain", url=other).bodies == [b"there"]
