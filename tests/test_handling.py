"""Handlers that are slow or that fail, and what is taken away while the scripts run."""

from __future__ import annotations

import re
from collections import Counter
from typing import Iterator

import pika
import pytest

from broker import Broker, ContainerBroker, LocalBroker, eventually
from conftest import Run, Start, UntilConsuming

LIMIT = 3
# A queue that gives up sooner than the scripts' own.
SHORT = f"""
consumer.QUEUE_ARGUMENTS.update({{"x-delivery-limit": {LIMIT}, "x-delayed-retry-min": 200}})
"""
# The same queue, with a constant pause between tries.
STEADY = f"""{SHORT}
consumer.QUEUE_ARGUMENTS["x-delayed-retry-max"] = 200
"""


def failing(on: str, arguments: str = SHORT) -> str:
    """A handler that writes what it is given and fails where the expression `on` is true."""
    return f"""{arguments}
tries = 0
def handle(method, properties, body):
    global tries
    tries += 1
    os.write(1, f"{{time.time()}} {{properties.message_id}} {{body.decode()}}\\n".encode())
    if {on}:
        raise ValueError("broken\\nin two lines")
"""


SLOW = """
def handle(method, properties, body):
    os.write(1, body + b"\\n")
    time.sleep(float(body))
"""


def test_a_handler_slower_than_the_heartbeat_keeps_its_connection_and_acknowledges_each_message(
    start: Start, run: Run, queue: str, broker: Broker
) -> None:
    run("producer", "-q", queue, "7", "7.5", "0", "0")
    url = f"{broker.url}?heartbeat=2"

    consumer = start("consumer", "-q", queue, "--prefetch", "3", handle=SLOW, url=url)
    eventually(lambda: consumer.bodies == [b"7", b"7.5"])

    # The fourth fits in the prefetch only when the first is acknowledged.
    eventually(lambda: broker.depth(queue) == 0, timeout=5)
    assert consumer.bodies == [b"7", b"7.5"]
    eventually(lambda: consumer.bodies == [b"7", b"7.5", b"0", b"0"])
    assert consumer.terminate() == 0
    assert consumer.stderr == ""
    assert broker.depth(queue) == 0


@pytest.mark.long
def test_a_slow_handler_keeps_its_connection_when_it_is_to_get_no_more_messages(
    run: Run, queue: str, broker: Broker
) -> None:
    run("producer", "-q", queue, "0", "7", "0")

    consumer = run("consumer", "-q", queue, "-c", "2", "--prefetch", "2", handle=SLOW, url=f"{broker.url}?heartbeat=2")

    assert (consumer.bodies, consumer.stderr) == ([b"0", b"7"], "")
    assert run("consumer", "-q", queue, "--drain", "-v").stderr.count("redelivered False") == 1


@pytest.fixture
def impatient(broker: Broker) -> Iterator[None]:
    """The broker waits two seconds for an acknowledgement."""
    setting = "[application:set_env(rabbit, Key, Value) || {{Key, Value}} <- [{{consumer_timeout, {}}}, {{channel_tick_interval, {}}}]]."
    broker.ctl("eval", setting.format(2000, 1000))
    yield
    broker.ctl("eval", setting.format(1800000, 60000))


@pytest.mark.ours
@pytest.mark.long
@pytest.mark.usefixtures("impatient")
def test_a_handler_slower_than_the_broker_allows_is_reported_and_no_message_is_handled_twice(
    start: Start, run: Run, queue: str
) -> None:
    run("producer", "-q", queue, "4", "0.1", "0.2")

    consumer = start("consumer", "-q", queue, handle=SLOW)

    eventually(lambda: {b"0.1", b"0.2"} <= set(consumer.bodies), timeout=30)
    assert consumer.terminate() == 0
    assert sorted(consumer.bodies) == [b"0.1", b"0.2", b"4"]
    lines = consumer.stderr.splitlines()
    assert lines
    assert all(re.search("timed out|slower than allowed", line) for line in lines)


FAILING = {
    "always": ("True", ["one"], ["one"]),
    "on the first of a batch": ("body == b'one'", ["one", "two", "three"], ["one"]),
    "on the last of a batch": ("body == b'three'", ["one", "two", "three"], ["three"]),
    "on all of a batch": ("True", ["one", "two", "three"], ["one", "two", "three"]),
    "on one in the middle": ("body == b'two'", ["one", "two", "three"], ["two"]),
}


@pytest.mark.parametrize(("on", "bodies", "poison"), FAILING.values(), ids=FAILING)
def test_what_the_handler_fails_on_is_tried_again_and_moved_to_dead_and_the_others_are_handled_once(
    start: Start, run: Run, queue: str, broker: Broker, on: str, bodies: list[str], poison: list[str]
) -> None:
    run("consumer", "-q", queue, "--drain", handle=failing(on))  # declares the queue
    run("producer", "-q", queue, *bodies)

    consumer = start("consumer", "-q", queue, handle=failing(on))
    eventually(lambda: broker.depth(f"{queue}.dead") == len(poison))
    assert consumer.terminate() == 0

    tries = [line.decode().split() for line in consumer.bodies]
    assert Counter(body for _, _, body in tries) == {body: LIMIT + 1 if body in poison else 1 for body in bodies}
    assert broker.depth(queue) == 0
    error = r"consumer\.py: error: message '(\S+)' failed: ValueError\('broken\\nin two lines'\)"
    failed = [re.fullmatch(error, line) for line in consumer.stderr.splitlines()]
    ids = [message_id for _, message_id, body in tries if body in poison]
    assert Counter(match and match[1] for match in failed) == Counter(ids)
    if broker.version() >= (4, 3):
        for body in poison:
            times = [float(at) for at, _, tried in tries if tried == body]
            pauses = [after - before for before, after in zip(times, times[1:])]
            assert all(pause > 0.19 * number for number, pause in enumerate(pauses, 1)), pauses


def test_what_the_handler_fails_on_at_first_is_handled_in_the_end(
    start: Start, run: Run, queue: str, broker: Broker
) -> None:
    handle = failing(f"tries <= {LIMIT}")
    run("consumer", "-q", queue, "--drain", handle=handle)
    run("producer", "-q", queue, "one")

    consumer = start("consumer", "-q", queue, handle=handle)

    eventually(lambda: len(consumer.bodies) == LIMIT + 1)
    assert consumer.terminate() == 0
    assert len(consumer.stderr.splitlines()) == LIMIT
    assert broker.depth(queue) == broker.depth(f"{queue}.dead") == 0


def test_a_message_that_failed_is_not_taken_for_its_twin_that_was_handled(
    start: Start, run: Run, queue: str, broker: Broker
) -> None:
    handle = failing("tries == 2")
    run("consumer", "-q", queue, "--drain", handle=handle)  # declares the queue
    with broker.connect() as connection:
        for _ in range(2):
            connection.channel().basic_publish("", queue, b"order", pika.BasicProperties(message_id="order-1"))

    consumer = start("consumer", "-q", queue, handle=handle)

    eventually(lambda: len(consumer.bodies) == 3, timeout=20)
    assert consumer.terminate() == 0


def test_an_error_that_is_no_exception_is_one_of_the_handler_too(run: Run, queue: str, broker: Broker) -> None:
    handle = failing("tries == 1").replace("raise ValueError", "import asyncio; raise asyncio.CancelledError")
    run("consumer", "-q", queue, "--drain", handle=handle)  # declares the queue
    run("producer", "-q", queue, "one")

    consumer = run("consumer", "-q", queue, "-c", "2", handle=handle)

    assert len(consumer.bodies) == 2


def test_an_error_is_one_short_line_whatever_the_message_is(run: Run, queue: str, broker: Broker) -> None:
    handle = f"{SHORT}\ndef handle(method, properties, body): body.decode()\n"
    run("consumer", "-q", queue, "--drain", handle=handle)  # declares the queue
    with broker.connect() as connection:
        properties = pika.BasicProperties(message_id="an id\nconsumer.py: a forged line")
        connection.channel().basic_publish("", queue, b"\xff" * 1_000_000, properties)

    consumer = run("consumer", "-q", queue, "-c", "1", handle=handle)

    (line,) = consumer.stderr.splitlines()
    start = r"consumer.py: error: message 'an id\nconsumer.py: a forged line' failed: UnicodeDecodeError("
    assert line.startswith(start)
    assert len(line) < 1000


def test_a_process_that_a_handler_forks_ends_when_it_is_told_to(run: Run, queue: str) -> None:
    run("producer", "-q", queue, "one")
    handle = """
import multiprocessing
def handle(method, properties, body):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=lambda: (ready.set(), time.sleep(600)))
    process.start()
    ready.wait()
    process.terminate()
    process.join()
    print("ended")
"""

    assert run("consumer", "-q", queue, "--drain", handle=handle).bodies == [b"ended"]


def test_a_handler_that_exits_ends_the_program_as_it_says_and_leaves_the_rest_in_the_queue(
    start: Start, run: Run, queue: str
) -> None:
    run("producer", "-q", queue, "one", "two", "three")
    handle = "def handle(method, properties, body):\n    if body == b'two': sys.exit('enough')\n    os.write(1, body)"

    consumer = start("consumer", "-q", queue, handle=handle)

    assert consumer.end() == 1
    assert (consumer.stdout, consumer.stderr) == (b"one", "enough\n")
    rest = run("consumer", "-q", queue, "--drain")
    assert sorted(rest.bodies) == [b"three", b"two"]


@pytest.mark.long
def test_a_dead_message_is_kept_however_often_a_handler_fails_on_it(
    start: Start, run: Run, queue: str, broker: Broker
) -> None:
    dead, always = f"{queue}.dead", failing("True", STEADY)
    run("consumer", "-q", queue, "--drain", handle=always)
    run("producer", "-q", queue, "poison")
    first = start("consumer", "-q", queue, handle=always)
    eventually(lambda: broker.depth(dead) == 1)
    assert first.terminate() == 0

    second = start("consumer", "-q", dead, handle=always)
    eventually(lambda: len(second.bodies) > 22)  # RabbitMQ 4 drops after 20 where nothing else is said
    assert second.terminate() == 0
    third = run("consumer", "-q", dead, "-c", "1")

    assert second.stderr.count("failed: ValueError") == second.stderr.count("\n") == len(second.bodies)
    assert third.bodies == [b"poison"]


@pytest.mark.ours
@pytest.mark.long
def test_no_message_is_lost_when_the_broker_is_killed_while_messages_move_to_dead(
    start: Start, run: Run, queue: str, broker: ContainerBroker | LocalBroker
) -> None:
    dead = f"{queue}.dead"
    arguments = '\nconsumer.QUEUE_ARGUMENTS.update({"x-delivery-limit": 1, "x-delayed-retry-min": 1})\n'
    always = failing("time.sleep(0.002) or True", arguments)
    run("consumer", "-q", queue, "--drain", handle=always)
    broker.stop()  # RabbitMQ 3.10 loses the newest queue if it is killed within seconds of its declaration
    broker.start()
    bodies = [b"%d" % number for number in range(1000)]
    run("producer", "-q", queue, "-", input=b"\n".join(bodies))

    consumer = start("consumer", "-q", queue, handle=always)
    eventually(lambda: broker.depth(dead) > 0)
    moved = broker.depth(dead)
    broker.kill()
    broker.start()
    eventually(lambda: broker.depth(dead) >= len(bodies))
    assert consumer.terminate() == 0

    assert moved < len(bodies)
    left = run("consumer", "-q", queue, "--drain").bodies + run("consumer", "-q", dead, "--drain").bodies
    assert set(left) == set(bodies)


def test_a_private_queue_drops_what_the_handler_fails_on_twice(start: Start, queue: str, exchange: str) -> None:
    consumer = start("consumer", "-e", exchange, "-t", "fanout", handle=failing("body == b'bad'", ""))

    def publish(*bodies: str) -> bool:
        return start("producer", "-e", exchange, *bodies).end() == 0

    def handled() -> list[str]:
        return [line.decode().split()[2] for line in consumer.bodies]

    eventually(lambda: publish("probe"))
    assert publish("bad", "good")
    eventually(lambda: handled().count("bad") == 2)
    assert publish("end")

    eventually(lambda: "end" in handled())
    assert consumer.terminate() == 0
    assert Counter(handled()) == {"probe": 1, "bad": 2, "good": 1, "end": 1}
    assert consumer.stderr.count("failed: ValueError") == consumer.stderr.count("\n") == 2


def test_a_failing_message_in_a_classic_queue_does_not_block_the_others(
    start: Start, run: Run, queue: str, broker: Broker
) -> None:
    with broker.connect() as connection:
        connection.channel().queue_declare(queue, durable=True)
    run("producer", "-q", queue, "one", "bad", "two")

    consumer = start("consumer", "-q", queue, handle=failing("body == b'bad'", ""))

    eventually(lambda: b" two\n" in consumer.stdout and consumer.stdout.count(b" bad\n") > 3)
    run("producer", "-q", queue, "three")
    eventually(lambda: b" three\n" in consumer.stdout)
    assert consumer.terminate() == 0
    handled = Counter(line.split()[2] for line in consumer.bodies)
    assert handled == {b"one": 1, b"two": 1, b"three": 1, b"bad": handled[b"bad"]}
    _, *times = [float(line.split()[0]) for line in consumer.bodies if line.endswith(b" bad")]
    assert all(after - before > 0.9 for before, after in zip(times, times[1:]))  # it does not spin
    assert broker.depth(queue) == 1


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
    assert consumer.terminate() == 0
    assert re.fullmatch(r"consumer\.py: .*cancelled: queue deleted.*; next try in .* s\n", consumer.stderr)


def test_a_producer_whose_exchange_is_deleted_says_so_at_once(
    start: Start, queue: str, exchange: str, broker: Broker
) -> None:
    with broker.connect() as connection:
        channel = connection.channel()
        channel.exchange_declare(exchange, "fanout", durable=True)
        channel.queue_declare(queue, durable=True)
        channel.queue_bind(queue, exchange)
    producer = start("producer", "-e", exchange, "-")
    producer.write(b"one\n")
    eventually(lambda: broker.depth(queue) == 1)

    with broker.connect() as connection:
        connection.channel().exchange_delete(exchange)
    producer.write(b"two\n")

    eventually(lambda: producer.process.poll() == 1, timeout=20)
    assert re.fullmatch(
        rf"producer\.py: error: .*no exchange '{exchange}'.*; 1 messages are safe, resume with: tail -n \+2\n",
        producer.stderr,
    )


@pytest.mark.ours
@pytest.mark.parametrize(
    "change",
    [["clear_permissions", "somebody"], ["set_permissions", "somebody", "^$", "^$", "^$"], ["delete_user", "somebody"]],
    ids=lambda change: change[0],
)
def test_permissions_that_are_taken_away_end_both_scripts_with_the_reason(
    start: Start, queue: str, broker: Broker, until_consuming: UntilConsuming, change: list[str]
) -> None:  # fmt: skip
    broker.ctl("add_user", "somebody", "s3cret")
    try:
        broker.ctl("set_permissions", "somebody", ".*", ".*", ".*")
        url = broker.url.replace("guest:guest", "somebody:s3cret")
        producer, consumer = start("producer", "-q", queue, "-", url=url), start("consumer", "-q", queue, url=url)
        producer.write(b"one\n")
        eventually(lambda: consumer.bodies == [b"one"])

        broker.ctl(*change)
        broker.ctl("close_all_connections", "maintenance")

        for script in producer, consumer:
            eventually(lambda script=script: script.process.poll() == 1)  # type: ignore[misc]
            assert re.match(r".*\.py: error: .*(access|user|permission)", script.stderr.splitlines()[-1])
            assert "s3cret" not in script.stderr
        assert "1 messages are safe" in producer.stderr
    finally:
        if change[0] != "delete_user":
            broker.ctl("delete_user", "somebody")


def test_what_a_handler_prints_is_written_before_it_is_acknowledged(start: Start, run: Run, queue: str) -> None:
    run("producer", "-q", queue, "one", "two", "three")
    handle = """
def handle(method, properties, body):
    if body == b"three":
        os.write(2, b"three")
        time.sleep(600)
    print(body.decode())
"""

    # With a prefetch of one, the third comes when the first two are acknowledged.
    consumer = start("consumer", "-q", queue, "--prefetch", "1", handle=handle, env={"PYTHONUNBUFFERED": ""})
    eventually(lambda: consumer.stderr == "three")
    consumer.kill()

    assert consumer.bodies == [b"one", b"two"]
    rest = start("consumer", "-q", queue, "-c", "1")
    assert rest.end() == 0
    assert rest.bodies == [b"three"]
