"""Handle the messages of a RabbitMQ queue, one after the other, until told to stop.

    python consumer.py                      write each message to standard output, one a line
    python consumer.py --drain > messages   the same, until the queue is empty

Guaranteed: a message is acknowledged after `handle` returned; whatever breaks before, it comes again. If `handle`
fails, it comes later, and moves to the queue NAME.dead in the end. `handle` may take 30 minutes. Outages are waited for.
Not guaranteed: that a message comes once only, nor in order. A private queue (-e without -q) ends with its connection.
To make it yours, replace `handle`. The other half of the pair is producer.py.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import math
import os
import random
import select
import signal
import sys
import time
from collections import deque
from concurrent import futures
from typing import Any, Sequence

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPChannelError, AMQPConnectionError, ChannelClosedByBroker, ConsumerCancelled

URL = "amqp://guest:guest@localhost:5672/%2F"
QUEUE = "hello"
CONNECT_TIMEOUT = math.inf  # seconds; a service that is restarted by something else may want less
PREFETCH = 10  # taken in advance, all to be done in 30 minutes: 1 for jobs of minutes, 100 to 300 for the highest rate
QUEUE_ARGUMENTS = {
    "x-queue-type": "quorum",
    "x-delivery-limit": 20,  # how often a message that `handle` fails on comes again before it moves to NAME.dead
    "x-delayed-retry-type": "failed",  # RabbitMQ 4.3 and later wait before it comes again
    "x-delayed-retry-min": 1000,  # ms, times how often it has failed
    "x-delayed-retry-max": 60000,  # ms
    "x-dead-letter-exchange": "",
    "x-dead-letter-strategy": "at-least-once",  # https://www.rabbitmq.com/docs/quorum-queues#dead-lettering
    "x-overflow": "reject-publish",  # is required by at-least-once
}
DEAD_QUEUE_ARGUMENTS = {"x-queue-type": "quorum", "x-delivery-limit": 2**31 - 1}  # RabbitMQ 4 drops after 20 by default


def handle(method: pika.spec.Basic.Deliver, properties: pika.BasicProperties, body: bytes) -> None:
    """Return when the message is done with. An exception has it delivered again later; sys.exit() ends the program."""
    line = body + b"\n"
    while line:  # because `python -u` may write a part
        line = line[sys.stdout.buffer.write(line) :]


# From here to `common_options`, the text is the same in producer.py and consumer.py.
OUTAGES = (AMQPConnectionError, AMQPChannelError, AMQPConnectorException, OSError)
# What the broker, or TLS, says when another try is useless. NOT_FOUND without "no" can be a queue whose node is down.
FINAL = "ACCESS_REFUSED", "NOT_ALLOWED", "NOT_FOUND - no", "PRECONDITION_FAILED", "RESOURCE_LOCKED", "CERTIFICATE"
log = logging.getLogger(__name__)


def declare(connection: pika.BlockingConnection, options: argparse.Namespace) -> BlockingChannel:
    """Declare the exchange and the queue that the options name; return an open channel."""
    channel, exchange, queue = connection.channel(), options.exchange, options.queue
    if exchange:
        kind = options.type or "direct"  # ignored by a passive declaration, which asks whether the exchange exists
        channel.exchange_declare(exchange=exchange, exchange_type=kind, durable=True, passive=not options.type)
    if queue and not queue.endswith(".dead"):  # NAME.dead is declared together with NAME
        arguments = {**QUEUE_ARGUMENTS, "x-dead-letter-routing-key": f"{queue}.dead"}
        try:
            channel.queue_declare(queue=queue, durable=True, arguments=arguments)
            channel.queue_declare(queue=f"{queue}.dead", durable=True, arguments=DEAD_QUEUE_ARGUMENTS)
        except ChannelClosedByBroker as error:
            if error.reply_code not in (403, 406):  # no right to configure it; it has other settings
                raise
            log.warning("warning: the queue is used as it is: %s", error.reply_text)
            channel = connection.channel()
    return channel


def describe(error: BaseException, options: argparse.Namespace) -> str:
    text = str(error) or repr(error)  # some of pika's errors have no text
    if "ConnectionRefusedError" in text:
        text = "connection refused; start a broker with: docker compose up -d --wait"
    return f"{options.urls[0].host}:{options.urls[0].port}: {text}"


def retry_delay(error: BaseException, outage_began: float, options: argparse.Namespace) -> float:
    """Log the error, and return the seconds to the next try; raises the error if there is to be none."""
    lasted, text = time.monotonic() - outage_began, describe(error, options)
    if lasted >= options.connect_timeout or any(words in text for words in FINAL):
        raise error
    delay = random.uniform(0.5, 1) * min(0.5 + lasted, 5)  # random, so that clients do not all come at once
    log.warning("%s; next try in %.1f s", text, delay, exc_info=options.verbose)
    options.urls.append(options.urls.pop(0))  # each try is at the next URL
    return delay


def urls(text: str) -> list[pika.URLParameters]:
    """The connection parameters of each URL; errors do not repeat the URL, because of its password."""
    with contextlib.suppress(Exception):  # pika raises many types
        if text.startswith(("amqp://", "amqps://")):  # no split(","), because a URL can contain commas
            return [pika.URLParameters(url) for url in text.replace(",amqp", " amqp").split()]
    raise argparse.ArgumentTypeError("expected amqp://USER:PASSWORD@HOST:PORT/VHOST, special characters as %XX")


def common_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", dest="urls", type=urls, default=os.environ.get("AMQP_URL") or URL, help="URL[,URL]; or set AMQP_URL")
    add("-q", "--queue", help=f"default without -e: {QUEUE}")
    add("-e", "--exchange", help="must exist, unless -t is given")
    add("-t", "--type", choices=["direct", "fanout", "topic", "headers"], help="declare the exchange, of this type")
    add("-H", "--header", action="append", default=[], metavar="KEY=VALUE", help="repeatable")
    add("--connect-timeout", type=float, default=CONNECT_TIMEOUT, metavar="SECONDS", help="default: %(default)g")
    add("-v", "--verbose", action="store_true", help="more on stderr")
    return parser


class Consumer:
    """Has `handle` work in a thread of its own, and serves the connection meanwhile."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.remaining = options.count  # messages still to be given to `handle`
        self.stopping = False
        self.ended_by: BaseException | None = None  # what `handle` raised to end the program
        self.outage_began = time.monotonic()

    def stop(self, signal_number: int = 0, *_: Any) -> None:
        """Stop after the message in hand; a second Ctrl-C ends the program at once."""
        if self.stopping and signal_number == signal.SIGINT:
            os._exit(130)
        self.stopping = True

    def run(self) -> None:
        """Consume until told to stop. Raises pika's error if the broker refuses, or is away for --connect-timeout."""
        with futures.ThreadPoolExecutor(max_workers=1) as worker:
            while self.remaining and not self.stopping:
                try:
                    with pika.BlockingConnection(self.options.urls[0]) as connection:
                        self.consume(declare(connection, self.options), worker)
                except OUTAGES as error:
                    end = time.monotonic() + retry_delay(error, self.outage_began, self.options)
                    while not self.stopping and time.monotonic() < end:
                        time.sleep(0.1)
        if self.ended_by:
            raise self.ended_by

    def consume(self, channel: BlockingChannel, worker: futures.Executor) -> None:
        """Have messages handled until told to stop, then give back the others."""
        connection, queue = channel.connection, subscribe(channel, self.options)
        waiting: deque[Any] = deque()  # method, properties and body of each message that has come
        channel.basic_qos(prefetch_count=self.options.prefetch)
        tag = channel.basic_consume(queue=queue, on_message_callback=lambda _, *delivery: waiting.append(delivery))
        try:
            while self.remaining and not self.stopping:
                before = -1
                while before < len(waiting) <= self.options.prefetch // 2:  # until enough has come, or no more comes
                    before = len(waiting)
                    connection.process_data_events(time_limit=0 if waiting else 0.2)
                handled: list[int] = []  # delivery tags
                failed: list[int] = []
                if waiting:
                    batch = worker.submit(self.handle_batch, waiting, handled, failed)
                    while not batch.done():
                        futures.wait([batch], timeout=0.1)
                        connection.process_data_events()
                    batch.result()  # raises what else went wrong
                elif self.options.drain:
                    # Asks twice: the first answer can overtake messages on their way, the second comes after them.
                    ready = [channel.queue_declare(queue=queue, passive=True).method.message_count for _ in range(2)]
                    connection.process_data_events()
                    if not any(ready) and not waiting:
                        self.stopping = True
                if not channel.consumer_tags:
                    raise ConsumerCancelled("consumer cancelled: queue deleted, or handler slower than allowed")
                for delivery_tag in failed:  # a reject counts towards x-delivery-limit, a nack (since 4.3) does not
                    channel.basic_reject(delivery_tag=delivery_tag, requeue=True)
                if handled:  # all up to the last; those that failed are rejected already
                    channel.basic_ack(delivery_tag=handled[-1], multiple=True)
            connection.process_data_events()  # empties pika's buffer: a cancel rejects what is in it, as a failure
            channel.basic_cancel(consumer_tag=tag)
            channel.basic_nack(delivery_tag=0, multiple=True, requeue=True)
        finally:
            waiting.clear()  # these come again; a batch still running (after an outage) ends with the message in hand
            self.outage_began = time.monotonic()

    def handle_batch(self, waiting: deque[Any], handled: list[int], failed: list[int]) -> None:
        """Handle what is waiting: half the prefetch at most, or for 0.1 s, so that acknowledgements are not late."""
        end = time.monotonic() + 0.1
        for _ in range(max(1, self.options.prefetch // 2)):
            if not waiting or not self.remaining or self.stopping or time.monotonic() > end:
                return
            method, properties, body = waiting.popleft()
            if self.options.verbose:
                log.info("%s %s", method, properties)
            try:
                result = handle(method, properties, body)
                if result is not None:
                    raise TypeError(f"handle returned {result!r}, not None; it must not be async, nor a generator")
                sys.stdout.flush()
                handled.append(method.delivery_tag)
            except (SystemExit, KeyboardInterrupt) as error:
                self.ended_by, self.stopping = error, True
                return
            except BaseException as error:  # asyncio.CancelledError is no Exception
                closed = isinstance(error, BrokenPipeError) and nobody_reads()
                if not closed:
                    log.error("error: message %r: %.300r", properties.message_id, error, exc_info=self.options.verbose)
                if closed or getattr(error, "errno", 0) == errno.ENOSPC:
                    self.ended_by, self.stopping = SystemExit(0 if closed else 1), True
                    # Python flushes again at exit: https://docs.python.org/3/library/signal.html#note-on-sigpipe
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                    return
                failed.append(method.delivery_tag)
                if method.redelivered:
                    time.sleep(0.2)  # otherwise a queue that has no delayed retry is a busy loop
            self.remaining -= 1


def nobody_reads() -> bool:
    poll = select.poll()
    poll.register(1, 0)  # standard output, for errors only: a pipe whose reader has gone is one
    return bool(poll.poll(0))


def subscribe(channel: BlockingChannel, options: argparse.Namespace) -> str:
    """The name of the queue, which is bound to the exchange, if there is one."""
    queue = str(options.queue or channel.queue_declare(queue="", exclusive=True).method.queue)
    if options.exchange:
        arguments = {"x-match": options.match, **dict(text.split("=", 1) for text in options.header)}
        # By default any key at a topic exchange, an empty key at a direct one; the others ignore keys.
        for key in options.routing_key or ["#", ""]:
            channel.queue_bind(queue=queue, exchange=options.exchange, routing_key=key, arguments=arguments)
    return queue


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common_options()
    add = parser.add_argument
    add("-r", "--routing-key", action="append", help="of the binding to the exchange; repeatable")
    add("--match", choices=["all", "any"], default="all", help="how many of the headers must match; default: all")
    add("-c", "--count", type=int, default=math.inf, metavar="N", help="stop after N messages")
    add("--drain", action="store_true", help="stop when the queue is empty")
    add("--prefetch", type=int, default=PREFETCH, metavar="N", help="messages taken in advance; default: %(default)s")
    options = parser.parse_args(argv)
    if not all("=" in text for text in options.header):
        parser.error("-H: expected KEY=VALUE")
    if not options.exchange and (options.type or options.routing_key or options.header):
        parser.error("-t, -r and -H need -e")
    if options.count < 1:
        parser.error("--count: at least 1")
    if sys.stdout is None:
        parser.error("standard output is closed")
    options.queue = options.queue or (None if options.exchange else QUEUE)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    consumer = Consumer(parse(argv))
    handlers = {number: signal.signal(number, consumer.stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        consumer.run()
        return 0
    except Exception as error:
        log.error("error: %s", describe(error, consumer.options), exc_info=consumer.options.verbose)
        return 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    logging.basicConfig(format=f"{os.path.basename(__file__)}: %(message)s", level=logging.INFO)
    logging.getLogger("pika").setLevel(logging.CRITICAL + 1)  # it has seven errors for one refused connection
    sys.exit(main())
