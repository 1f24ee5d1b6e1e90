"""Messages to and from clients in other languages: Node's amqplib, and amqp-tools, which is librabbitmq's (C)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Callable

import pytest

from broker import Broker, eventually
from broker import run as run_command
from conftest import Run, Start

AMQPLIB = Path.home() / ".cache" / "amqplib-2.3.1"

PUBLISH = """
async ({exchange, key, body, properties}) => {
    channel.publish(exchange, key, Buffer.from(body, 'latin1'), properties)
    await channel.waitForConfirms()
}"""
CONSUME = """
({queue}) => new Promise(resolve => channel.consume(queue, message => {
    const {fields, properties, content} = message
    channel.ack(message)
    console.log(JSON.stringify({...fields, ...properties, body: content.toString('latin1')}))
    resolve()
}))"""
# Of the consumer: what `CONSUME` prints, under the same names.
HANDLE = """
import json
def handle(method, properties, body):
    fields = {
        "exchange": method.exchange, "routingKey": method.routing_key, "redelivered": method.redelivered,
        "contentType": properties.content_type, "contentEncoding": properties.content_encoding,
        "headers": properties.headers, "messageId": properties.message_id, "timestamp": properties.timestamp,
        "deliveryMode": properties.delivery_mode, "replyTo": properties.reply_to,
        "correlationId": properties.correlation_id, "body": body.decode("latin1"),
    }
    print(json.dumps(fields))
"""
BODY = "a line\r\nGrüße\0 \x00\xff\x80".encode("latin1")  # which is no UTF-8


def require(there: object, what: str, install: str) -> None:
    """Without it, the test is skipped, but fails where nobody would read that."""
    if not there:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{what} is missing, install it with: {install}")


@pytest.fixture
def node(broker: Broker) -> Callable[..., str]:
    """Run a function in Node, with amqplib's `channel`, and return what it prints."""
    require(shutil.which("node"), "Node.js", "apt-get install nodejs npm")
    require(AMQPLIB.exists(), "Node's amqplib", f"npm install --prefix {AMQPLIB} amqplib@2.3.1")

    def node(function: str, **argument: Any) -> str:
        program = f"""
            (async () => {{
                const connection = await require('amqplib').connect(process.argv[1])
                const channel = await connection.createConfirmChannel()
                await ({function})(JSON.parse(process.argv[2]))
                await channel.close()
                await connection.close()
            }})()"""
        command = ["node", "-e", program, broker.url, json.dumps(argument)]
        environment = {**os.environ, "NODE_PATH": str(AMQPLIB / "node_modules")}
        return run_command(command, env=environment)

    return node


@pytest.fixture
def amqp_tool(broker: Broker) -> Callable[..., bytes]:
    """Run one of amqp-tools with standard input, and return its output."""

    def amqp_tool(name: str, *arguments: str, input: bytes = b"") -> bytes:
        require(shutil.which(name), name, "apt-get install amqp-tools")
        command = [name, "--url", broker.url, *arguments]
        return subprocess.run(command, check=True, input=input, stdout=subprocess.PIPE, timeout=60).stdout

    return amqp_tool


@pytest.fixture
def subscription(run: Run, exchange: str, queue: str) -> str:
    """The queue, bound to the topic exchange for kern.*."""
    run("consumer", "-e", exchange, "-t", "topic", "-q", queue, "-r", "kern.*", "--drain")
    return queue


def test_a_message_of_node_comes_as_it_was_sent(
    run: Run, exchange: str, subscription: str, node: Callable[..., str]
) -> None:
    headers = {"text": "ä", "number": 3, "yes": True, "nothing": None, "list": [1, "a"], "table": {"x": {"y": "z"}}}
    properties = {
        "contentType": "application/json", "contentEncoding": "gzip", "headers": headers, "messageId": "ä-1",
        "correlationId": "c-1", "replyTo": "r-1", "timestamp": 1_700_000_000, "deliveryMode": 2,
    }  # fmt: skip

    node(PUBLISH, exchange=exchange, key="cron.ä", body="not bound", properties={})
    node(PUBLISH, exchange=exchange, key="kern.ä", body=BODY.decode("latin1"), properties=properties)

    (line,) = run("consumer", "-q", subscription, "--drain", handle=HANDLE).bodies
    fields = {"exchange": exchange, "routingKey": "kern.ä", "redelivered": False, "body": BODY.decode("latin1")}
    assert json.loads(line) == {**properties, **fields}


def test_a_message_comes_to_node_as_it_was_sent(
    run: Run, exchange: str, subscription: str, node: Callable[..., str], broker: Broker
) -> None:
    options = ["-r", "kern.ä", "-H", "host=wéb=1", "-H", "empty=", "--content-type", "application/json"]

    run("producer", "-e", exchange, *options, "-", input=BODY.replace(b"\n", b" "))

    message = json.loads(node(CONSUME, queue=subscription))
    assert (message["exchange"], message["routingKey"]) == (exchange, "kern.ä")
    assert message["body"] == BODY.replace(b"\n", b" ").decode("latin1")
    assert message["contentType"] == "application/json"
    assert message["headers"] == {"host": "wéb=1", "empty": ""}
    assert message["deliveryMode"] == 2
    assert message["messageId"]
    assert abs(message["timestamp"] - time.time()) < 3600
    assert broker.depth(subscription) == 0


def test_a_message_of_c_comes_as_it_was_sent(
    run: Run, exchange: str, subscription: str, amqp_tool: Callable[..., bytes]
) -> None:
    options = ["-e", exchange, "-p", "-C", "text/csv", "-E", "gzip", "-t", "r-1", "-H", "host: web1", "-H", "äh: ö"]

    amqp_tool("amqp-publish", *options, "-r", "cron.ä", input=b"not bound")
    amqp_tool("amqp-publish", *options, "-r", "kern.ä", input=BODY)

    (line,) = run("consumer", "-q", subscription, "--drain", handle=HANDLE).bodies
    assert json.loads(line) == {
        "exchange": exchange, "routingKey": "kern.ä", "redelivered": False, "body": BODY.decode("latin1"),
        "contentType": "text/csv", "contentEncoding": "gzip", "headers": {"host": "web1", "äh": "ö"},
        "messageId": None, "timestamp": None, "deliveryMode": 2, "replyTo": "r-1", "correlationId": None,
    }  # fmt: skip


def test_a_message_comes_to_c_as_it_was_sent(
    run: Run, exchange: str, subscription: str, amqp_tool: Callable[..., bytes], broker: Broker
) -> None:
    run("producer", "-e", exchange, "-r", "cron.x", "not bound", code=1)
    run("producer", "-e", exchange, "-r", "kern.x", "-H", "a=1", "-", input=BODY)
    first, second = BODY.split(b"\n")

    assert amqp_tool("amqp-get", "-q", subscription) == first
    assert amqp_tool("amqp-consume", "-q", subscription, "-c", "1", "cat") == second

    assert broker.depth(subscription) == 0


def test_a_message_that_cannot_be_decoded_moves_to_dead_and_the_others_are_handled(
    start: Start, run: Run, queue: str, node: Callable[..., str], broker: Broker
) -> None:
    limit = 'consumer.QUEUE_ARGUMENTS.update({"x-delivery-limit": 3, "x-delayed-retry-min": 200})'
    handle = f"{limit}\ndef handle(method, properties, body): print(body.decode())\n"
    run("consumer", "-q", queue, "--drain", handle=handle)  # declares the queue
    milliseconds = {"sent": {"!": "timestamp", "value": 1_764_078_683_000}}
    for number in range(20):
        headers = milliseconds if number == 5 else {}
        node(PUBLISH, exchange="", key=queue, body=str(number), properties={"headers": headers})

    consumer = start("consumer", "-q", queue, handle=handle)

    eventually(lambda: broker.depth(f"{queue}.dead") == 1, what=consumer.stderr)
    eventually(lambda: len(set(consumer.bodies)) == 19)
    assert consumer.terminate() == 0
    assert (broker.depth(queue), broker.depth(f"{queue}.dead")) == (0, 1)
    assert "out of range" in consumer.stderr


def test_what_no_message_of_ours_looks_like_is_handled_too(
    run: Run, queue: str, amqp_tool: Callable[..., bytes]
) -> None:
    """Strings that are no UTF-8, and no properties at all."""
    run("consumer", "-q", queue, "--drain")
    no_text = os.fsdecode(b"\xff\xfe")

    amqp_tool("amqp-publish", "-r", queue, "-C", no_text, "-H", f"{no_text}: {no_text}", input=b"one")
    amqp_tool("amqp-publish", "-r", queue, input=b"two")

    consumer = run("consumer", "-q", queue, "--drain", "-v")
    assert consumer.bodies == [b"one", b"two"]
    assert len(consumer.stderr.splitlines()) == 2
