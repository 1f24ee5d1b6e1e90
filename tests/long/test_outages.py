"""Faults of the broker and of the network: each message is accounted for, and none is lost."""

from __future__ import annotations

import random
import re
import subprocess
import time
from pathlib import Path
from typing import Callable

import pytest

from broker import Broker, eventually
from conftest import Gate, Run, Start
from long.cluster import Cluster
from long.conftest import Somebody
from long.faults import HANDLE, Handled, Stream, freeze, kill, lines, pauses, stop, thaw, until_tried
from proxy import Proxy

FAULTS = {"killed twice": [kill, kill], "stopped in order": [stop]}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_nothing_is_lost_when_the_broker_is(
    faults: list[Callable[[Broker], None]], own_broker: Broker, start: Start, queue: str, rng: random.Random
) -> None:
    stream = Stream(start, own_broker, queue)

    for times, fault in enumerate(faults, 1):
        # Not sooner, because RabbitMQ 3.10 loses the newest queue if it is killed within seconds of the declaration.
        stream.flow(rng.randint(6000, 10000))
        fault(own_broker)
        until_tried(*stream.scripts, times=times)
        own_broker.start()
    stream.flow(1000)

    stream.account()
    for script in stream.scripts:
        assert max(pauses(script)) <= 5


def test_nothing_is_lost_when_the_broker_freezes(own_broker: Broker, start: Start, queue: str) -> None:
    stream = Stream(start, own_broker, queue, url=f"{own_broker.url}?heartbeat=2")
    stream.flow(1000)

    freeze(own_broker)
    try:
        until_tried(*stream.scripts)
    finally:
        thaw(own_broker)

    stream.flow(1000)
    stream.account()


def test_scripts_that_start_before_the_broker_wait_for_it(own_broker: Broker, start: Start, queue: str) -> None:
    stop(own_broker)
    stream = Stream(start, own_broker, queue)
    until_tried(*stream.scripts, times=2)

    own_broker.start()

    stream.flow(1000)
    stream.account()
    for script in stream.scripts:
        assert script.stderr.count("connection refused; start a broker with: docker compose up -d --wait") >= 2


def test_nothing_is_lost_when_the_connection_is_cut_twenty_times(
    start: Start, broker: Broker, queue: str, proxy: Proxy, rng: random.Random
) -> None:
    stream = Stream(start, broker, queue, url=proxy.url)
    stream.flow(1)

    cuts = 0
    while cuts < 20:
        time.sleep(rng.uniform(0, 0.5))  # a moment that is random, not one that something is waited for
        cuts += proxy.cut() > 0

    stream.account()
    until_tried(*stream.scripts)


def test_nothing_is_lost_when_the_lines_go_mute(start: Start, broker: Broker, queue: str, proxy: Proxy) -> None:
    stream = Stream(start, broker, queue, url=f"{proxy.url}?heartbeat=2")
    stream.flow(1000)

    proxy.mute()

    until_tried(*stream.scripts)
    stream.flow(1000)
    stream.account()


ALARMS = {
    "memory": ("set_vm_memory_high_watermark", "0.00001", "0.4"),
    "disk": ("set_disk_free_limit", "1000000GB", "50MB"),
}


@pytest.mark.parametrize(("setting", "raised", "cleared"), ALARMS.values(), ids=ALARMS)
def test_an_alarm_is_waited_for(
    setting: str, raised: str, cleared: str, own_broker: Broker, start: Start, run: Run, queue: str
) -> None:
    run("producer", "-q", queue, "-", input=lines(1, 300))

    own_broker.ctl(setting, raised)
    try:
        producer = start("producer", "-q", queue, "-", input=lines(301, 3000))
        eventually(lambda: producer.stderr, what="it says why it waits")
        consumer = run("consumer", "-q", queue, "-c", "300")
        assert producer.process.poll() is None
    finally:
        own_broker.ctl(setting, cleared)

    assert producer.end() == 0, producer.stderr
    *warnings, last = producer.messages
    assert all("is the broker short of memory, disk" in line for line in warnings), producer.stderr
    assert last == "2700 messages published"
    assert consumer.stdout + run("consumer", "-q", queue, "--drain").stdout == lines(1, 3000)


@pytest.fixture
def full_queue(broker: Broker, queue: str) -> str:
    """A queue that refuses what is published when it has a hundred messages or a few more."""
    arguments = {"x-queue-type": "quorum", "x-max-length": 100, "x-overflow": "reject-publish"}
    with broker.connect() as connection:
        connection.channel().queue_declare(queue, durable=True, arguments=arguments)
    return queue


def test_a_full_queue_is_waited_for(start: Start, broker: Broker, full_queue: str) -> None:
    producer = start("producer", "-q", full_queue, "-", input=lines(1, 1000))
    until_tried(producer)

    consumer = start("consumer", "-q", full_queue, handle=HANDLE)

    assert producer.end() == 0, producer.stderr
    assert producer.messages[-1] == "1000 messages published"
    assert all("is the queue full?" in line for line in producer.messages if "next try" in line)
    handled = Handled(consumer)
    eventually(lambda: set(handled.numbers) == set(range(1, 1001)))
    assert len(set(handled.messages)) == 1000
    eventually(lambda: broker.depth(full_queue) == 0)
    assert consumer.stop() == 0


def test_a_full_queue_is_given_up_after_the_timeout(start: Start, broker: Broker, full_queue: str) -> None:
    producer = start("producer", "-q", full_queue, "--timeout", "1", "-")
    producer.write(lines(1, 50))
    eventually(lambda: broker.depth(full_queue) == 50)

    producer.write(lines(51, 1000))

    assert producer.end() == 1
    assert re.search("error: .*is the queue full.*; 50 messages are safe\n$", producer.stderr)
    assert "next try" in producer.stderr


def test_nothing_is_lost_when_consumers_are_killed_again_and_again(
    start: Start, run: Run, broker: Broker, queue: str, rng: random.Random
) -> None:
    run("producer", "-q", queue, "-", input=lines(1, 3000))
    handle = f"{HANDLE}; time.sleep(0.001)"  # so that there is something left for each
    handled = Handled()

    for _ in range(10):
        consumer = start("consumer", "-q", queue, handle=handle)
        handled.consumers.append(consumer)
        handled.until(handled.count + rng.randint(1, 100))
        consumer.process.kill()
    handled.consumers.append(start("consumer", "-q", queue, handle=handle))

    eventually(lambda: len(set(handled.numbers)) == 3000)
    eventually(lambda: broker.depth(queue) == 0)
    assert handled.consumers[-1].stop() == 0
    assert len(set(handled.messages)) == 3000
    assert broker.depth(f"{queue}.dead") == 0


def test_what_a_killed_producer_published_has_no_gap(
    start: Start, run: Run, broker: Broker, queue: str, rng: random.Random
) -> None:
    for _ in range(3):
        stream = Stream(start, broker, queue)
        stream.flow(rng.randint(1, 3000))

        stream.producer.process.kill()
        stream.end()

        assert stream.consumer.stop() == 0
        numbers = stream.handled.numbers + [int(body) for body in run("consumer", "-q", queue, "--drain").bodies]
        assert sorted(numbers) == list(range(1, len(numbers) + 1))
        assert len(numbers) <= stream.sent


@pytest.mark.parametrize("outage", [Proxy.refuse, Proxy.cut], ids=["while the broker is away", "after it is back"])
def test_what_ends_a_handler_during_an_outage_ends_the_program(
    outage: Callable[[Proxy], object],
    start: Start, run: Run, broker: Broker, queue: str, proxy: Proxy, gate: Gate, tmp_path: Path,
) -> None:  # fmt: skip
    run("producer", "-q", queue, "one", "two")
    begun = tmp_path / "begun"
    handle = (
        f"def handle(method, properties, body):\n    open({str(begun)!r}, 'w')\n    {gate.statement}\n    sys.exit(3)"
    )
    consumer = start("consumer", "-q", queue, handle=handle, url=proxy.url)
    eventually(begun.exists)

    outage(proxy)
    until_tried(consumer)
    eventually(lambda: outage is Proxy.refuse or proxy.lines)
    gate.open()

    assert consumer.end() == 3
    assert pauses(consumer)  # and says nothing else
    eventually(lambda: broker.depth(queue) == 2, what="nothing was acknowledged")


def test_a_producer_that_gives_up_says_where_to_resume(
    start: Start, run: Run, broker: Broker, queue: str, proxy: Proxy, tmp_path: Path, rng: random.Random
) -> None:
    (tmp_path / "file").write_bytes(lines(1, 100_000))
    with (tmp_path / "file").open("rb") as stdin:
        producer = start("producer", "-q", queue, "--timeout", "1", "-", url=proxy.url, stdin=stdin)
    wanted = rng.randint(5000, 10_000)
    eventually(lambda: broker.depth(queue) >= wanted)

    proxy.refuse()

    assert producer.end() == 1
    safe = re.search(r"error: .*; (\d+) messages are safe\n$", producer.stderr)
    assert safe, producer.stderr
    resume = ["tail", "-n", f"+{int(safe[1]) + 1}", str(tmp_path / "file")]
    rest = subprocess.run(resume, stdout=subprocess.PIPE, check=True).stdout
    assert 0 < len(rest) < len(lines(1, 100_000))
    run("producer", "-q", queue, "-", input=rest)
    numbers = [int(body) for body in run("consumer", "-q", queue, "--drain", "--prefetch", "300").bodies]
    assert set(numbers) == set(range(1, 100_001))
    assert len(numbers) - 100_000 <= 2000  # one batch comes twice at most


def test_no_message_is_lost_when_the_broker_is_killed_as_they_move_to_dead(
    start: Start, run: Run, own_broker: Broker, queue: str
) -> None:
    handle = """
QUEUE_ARGUMENTS["x-delivery-limit"] = 0  # the first failure moves it
def handle(method, properties, body): raise ValueError
"""
    dead, bodies = f"{queue}.dead", [b"%d" % number for number in range(10_000)]
    run("consumer", "-q", queue, "--drain", handle=handle)
    stop(own_broker)  # RabbitMQ 3.10 loses the newest queue if it is killed within seconds of its declaration
    own_broker.start()
    run("producer", "-q", queue, "-", input=b"\n".join(bodies))

    consumer = start("consumer", "-q", queue, "--prefetch", "100", handle=handle)
    moved = eventually(lambda: max(own_broker.depth(dead), 0))
    kill(own_broker)
    own_broker.start()
    eventually(lambda: own_broker.depth(dead) >= len(bodies), timeout=120)
    assert consumer.stop() == 0

    assert moved < len(bodies)
    left = run("consumer", "-q", queue, "--drain").bodies + run("consumer", "-q", dead, "--drain").bodies
    assert set(left) == set(bodies)


@pytest.mark.parametrize("change", ["clear_permissions", "delete_user"])
def test_permissions_that_are_taken_away_end_both_scripts(
    change: str, own_broker: Broker, start: Start, queue: str, proxy: Proxy, somebody: Somebody
) -> None:
    url = somebody(proxy.url)
    producer, consumer = start("producer", "-q", queue, "-", url=url), start("consumer", "-q", queue, url=url)
    producer.write(b"one\n")
    eventually(lambda: consumer.bodies == [b"one"])

    own_broker.ctl(change, "somebody")
    proxy.cut()
    producer.write(b"two\n")

    for script in producer, consumer:
        assert script.end() == 1
        cut, refused = script.stderr.splitlines()
        assert "next try" in cut
        assert re.search("error: .*(ACCESS_REFUSED|NOT_ALLOWED)", refused)
        assert "s3cret" not in script.stderr
    assert producer.stderr.endswith("; 1 messages are safe\n")


def test_idle_scripts_whose_connections_are_closed_connect_again(own_broker: Broker, start: Start, queue: str) -> None:
    producer, consumer = start("producer", "-q", queue, "-"), start("consumer", "-q", queue)
    producer.write(b"one\n")
    eventually(lambda: consumer.bodies == [b"one"])

    own_broker.ctl("close_all_connections", "maintenance")
    producer.write(b"two\n")

    eventually(lambda: b"two" in consumer.bodies)
    assert producer.end() == 0
    assert consumer.stop() == 0
    for script in producer, consumer:
        assert len(pauses(script)) == 1
        assert "maintenance" in script.stderr


def test_pauses_between_tries_grow_to_five_seconds_and_are_random(start: Start, queue: str, proxy: Proxy) -> None:
    proxy.refuse()
    scripts = [start("producer", "-q", queue, "one", url=proxy.url) for _ in range(3)]
    scripts += [start("consumer", "-q", queue, url=proxy.url) for _ in range(3)]

    eventually(lambda: all(max(pauses(script), default=0) > 2.5 for script in scripts))

    assert all(pauses(script)[0] < 1 and max(pauses(script)) <= 5 for script in scripts)
    # If they were not random, each would be 0.2 s and all that were before, or more.
    assert any(third < 0.9 * (0.2 + first + second) for first, second, third, *_ in map(pauses, scripts))


@pytest.mark.parametrize("other", ["127.0.0.1:1", "no-such-host.invalid"])
def test_a_broker_that_cannot_be_reached_does_not_hide_the_next(
    other: str, broker: Broker, run: Run, queue: str
) -> None:
    urls = f"amqp://{other}/,{broker.url}"

    producer = run("producer", "-q", queue, "one", url=urls)
    consumer = run("consumer", "-q", queue, "--drain", url=urls)

    assert consumer.bodies == [b"one"]
    for script in producer, consumer:
        assert len(pauses(script)) == 1
        assert other in script.stderr


def test_a_cluster_that_loses_a_node_loses_no_message(cluster: Cluster, start: Start, queue: str) -> None:
    stream = Stream(start, cluster.nodes[0], queue, url=cluster.url, pause=0.05)  # so that a node can catch up
    stream.flow(2000)
    leader = cluster.leader(queue)
    other = next(node for node in cluster.nodes if node is not leader)

    kill(leader)
    stream.flow(2000)
    leader.start()
    stop(other)
    stream.flow(2000)
    other.start()
    stream.flow(1000)

    stream.account()


def test_nothing_counts_as_published_while_the_cluster_has_no_majority(
    cluster: Cluster, start: Start, run: Run, queue: str
) -> None:
    run("producer", "-q", queue, "one", url=cluster.url)
    leader = cluster.leader(queue)
    other = next(node for node in cluster.nodes if node is not leader)
    kill(leader)
    kill(other)

    producer = start("producer", "-q", queue, "two", url=cluster.url)
    eventually(lambda: re.search("is the broker short of|messages were rejected|next try", producer.stderr))
    assert producer.process.poll() is None
    other.start()  # a majority, without the node that led before

    assert producer.end() == 0, producer.stderr
    leader.start()
    assert run("consumer", "-q", queue, "--drain", url=cluster.url).bodies == [b"one", b"two"]


def test_a_queue_whose_only_node_is_down_is_waited_for(cluster: Cluster, start: Start, queue: str) -> None:
    home = cluster.nodes[1]
    with home.connect() as connection:
        connection.channel().queue_declare(queue, durable=True, arguments={"x-queue-type": "classic"})
    stop(home)

    producer = start("producer", "-q", queue, "one", url=cluster.url)
    consumer = start("consumer", "-q", queue, url=cluster.url)
    until_tried(producer, consumer, times=2)
    home.start()

    assert producer.end() == 0, producer.stderr
    eventually(lambda: consumer.bodies == [b"one"], what=consumer.stderr)
    assert consumer.stop() == 0
