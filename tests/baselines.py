"""What the benchmark compares the pair with: pika, as a reader of its documentation would use it first.

Each takes the URL, a queue and what else it says: python baselines.py publish_confirmed URL QUEUE
"""

from __future__ import annotations

import sys

import pika
from pika.adapters.blocking_connection import BlockingChannel

PERSISTENT = pika.BasicProperties(delivery_mode=2)


def connect(url: str, queue: str) -> tuple[pika.BlockingConnection, BlockingChannel]:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.queue_declare(queue, durable=True, passive=len(sys.argv) > 4, arguments={"x-queue-type": "quorum"})
    return connection, channel


def hello(url: str, queue: str) -> None:
    connection, channel = connect(url, queue)
    channel.confirm_delivery()
    channel.basic_publish("", queue, b"Hello World!", PERSISTENT)
    connection.close()


def publish(url: str, queue: str) -> None:
    connection, channel = connect(url, queue)
    for line in sys.stdin.buffer:
        channel.basic_publish("", queue, line[:-1], PERSISTENT)
    connection.close()


def publish_confirmed(url: str, queue: str) -> None:
    connection, channel = connect(url, queue)
    channel.confirm_delivery()
    for line in sys.stdin.buffer:
        channel.basic_publish("", queue, line[:-1], PERSISTENT, mandatory=True)
    connection.close()


def consume(url: str, queue: str, count: str, prefetch: str) -> None:
    """Prefetch 0 means automatic acknowledgement."""
    connection, channel = connect(url, queue)
    channel.basic_qos(prefetch_count=int(prefetch))
    for number, (method, _, body) in enumerate(channel.consume(queue, auto_ack=prefetch == "0"), 1):
        assert method and body is not None
        sys.stdout.buffer.write(body + b"\n")
        if prefetch != "0":
            channel.basic_ack(method.delivery_tag)
        if number == int(count):
            break
    sys.stdout.buffer.flush()
    connection.close()


def consume_callback(url: str, queue: str) -> None:
    _, channel = connect(url, queue)
    channel.basic_qos(prefetch_count=10)

    def on_message(
        channel: BlockingChannel, method: pika.spec.Basic.Deliver, properties: pika.BasicProperties, body: bytes
    ) -> None:
        sys.stdout.buffer.write(body + b"\n")
        sys.stdout.buffer.flush()
        channel.basic_ack(method.delivery_tag)

    channel.basic_consume(queue, on_message)
    channel.start_consuming()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
