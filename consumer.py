"""Handle the messages of a RabbitMQ queue, one after the other, until told to stop.

    python consumer.py                      write each message to standard output, one a line
    python consumer.py --drain > messages   the same, until the queue has nothing to give

Guaranteed: a message is acknowledged only after `handle` has returned. One that fails is tried again, while others are
handled, and ends in NAME.dead (but for queues that are private, or declared elsewhere). It may be delivered twice.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import os
import random
import re
import signal
import sys
import time
from concurrent import futures
from typing import Any, Sequence

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPChannelError, AMQPConnectionError, AMQPError, ChannelClosedByBroker, ConsumerCancelled

URL = "amqp://guest:guest@localhost:5672/%2F"
QUEUE = "hello"
TIMEOUT = float("inf")  # seconds without a connection after which to give up
PREFETCH = 10  # messages taken in advance: 1 for jobs that take minutes, 100 to 300 for the highest rate
QUEUE_ARGUMENTS = {
    "x-queue-type": "quorum",
    "x-delivery-limit": 20,  # redeliveries of a message that fails, before it moves to NAME.dead
    "x-delayed-retry-type": "failed",  # RabbitMQ 4.3 and later wait before they deliver it again
    "x-delayed-retry-min": 10_000,  # ms, multiplied by the number of failures
    "x-delayed-retry-max": 300_000,  # ms
    "x-dead-letter-exchange": "",
    "x-dead-letter-strategy": "at-least-once",  # https://www.rabbitmq.com/docs/quorum-queues#dead-lettering
    "x-overflow": "reject-publish",  # required by at-least-once
}
DEAD_QUEUE_ARGUMENTS = {"x-queue-type": "quorum", "x-delivery-limit": 2**31 - 1}  # RabbitMQ 4 drops after 20 by default


class Reject(Exception):
    """Raised by `handle` for a message that can never be handled. It moves to NAME.dead; without one, it is dropped."""


def handle(method: pika.spec.Basic.Deliver, properties: pika.BasicProperties, body: bytes) -> None:
    """Return None to have the message acknowledged; raise to have it tried again. sys.exit() leaves it in the queue."""
    line = body + b"\n"
    try:
        while line:  # a signal can interrupt the writing of a long line
            line = line[os.write(1, line) :]
    except OSError as error:
        sys.exit(0 if isinstance(error, BrokenPipeError) else f"error: standard output: {error.strerror}")


# Both files share QUEUE_ARGUMENTS, DEAD_QUEUE_ARGUMENTS, and everything from here down to the class.
log = logging.getLogger(__name__)
ERRORS = (AMQPError, AMQPConnectorException, OSError)  # whatever the broker or the network can cause
OUTAGES = (AMQPConnectionError, AMQPChannelError, AMQPConnectorException, OSError)  # reconnect after one of these
# But not if the text matches this. A connection limit and "NOT_FOUND - home node" are temporary, and do not match.
FINAL = "ACCESS_REFUSED|NOT_ALLOWED(?!.*limit)|NOT_FOUND - no|PRECONDITION_FAILED|RESOURCE_LOCKED|CERTIFICATE_VERIFY"


def connect(last_progress: float, options: argparse.Namespace) -> pika.BlockingConnection:
    """Connect to the first URL. Each of its addresses takes half of --timeout at most, to leave time for the next."""
    parameters, left = copy.copy(options.urls[0]), last_progress + options.timeout - time.monotonic()
    limit = max(1, min(options.timeout / 2, 30))  # seconds; 30, because --timeout may be infinite
    parameters.stack_timeout = min(parameters.stack_timeout, limit, max(1, left))
    # pika's own time limits do not cover a broker that has stopped reading. This one, of the Linux kernel, does.
    parameters.tcp_options = {"TCP_USER_TIMEOUT": int(1000 * limit), **(parameters.tcp_options or {})}
    name = f"{os.path.basename(sys.argv[0])} on {os.uname().nodename}, process {os.getpid()}"
    parameters.client_properties = {"connection_name": name, **(parameters.client_properties or {})}
    return pika.BlockingConnection(parameters)


def declare(connection: pika.BlockingConnection, options: argparse.Namespace) -> BlockingChannel:
    """Declare the exchange and the queue that the options name; return an open channel."""
    channel, exchange, kind, queue = connection.channel(), options.exchange, options.type, options.queue
    if exchange:  # without --type, only check that it exists: a passive declaration ignores the type
        channel.exchange_declare(exchange=exchange, exchange_type=kind or "direct", durable=True, passive=not kind)
    if queue and not queue.endswith(".dead"):  # NAME.dead is declared together with NAME
        arguments = {**QUEUE_ARGUMENTS, "x-dead-letter-routing-key": f"{queue}.dead"}
        try:
            channel.queue_declare(queue=queue, durable=True, arguments=arguments)
            channel.queue_declare(queue=f"{queue}.dead", durable=True, arguments=DEAD_QUEUE_ARGUMENTS)
        except ChannelClosedByBroker as error:
            if error.reply_code not in (403, 406):  # 403: no right to configure it; 406: it has other arguments
                raise
            log.warning("warning: the queue is used as it is: %s", error.reply_text)
            channel = connection.channel()
    return channel


def describe(error: BaseException, options: argparse.Namespace) -> str:
    text = str(error) or repr(error)  # some of pika's errors have no text
    if "ConnectionRefusedError" in text:
        text = "connection refused; start a broker with: docker compose up -d --wait"
    return f"{options.urls[0].host}:{options.urls[0].port}: {text}" if isinstance(error, ERRORS) else text


def raise_or_delay(error: Exception, last_progress: float, options: argparse.Namespace) -> float:
    """Raise the error if it is final, or --timeout is over; else log it, and return the seconds until the next try."""
    text, lasted = describe(error, options), time.monotonic() - last_progress
    if re.search(FINAL, text) or lasted >= options.timeout:
        raise error
    delay: float = min(random.uniform(0.5, 1) * min(0.2 + lasted, 5), options.timeout - lasted)
    log.warning("%s; next try in %.1f s", text, delay, exc_info=options.verbose)
    options.urls = options.urls[1:] + options.urls[:1]  # the next try is at the next URL
    return delay


def parse_urls(text: str) -> list[pika.URLParameters]:
    """The connection parameters of each URL; errors do not repeat the URL, because of its password."""
    with contextlib.suppress(Exception):  # pika raises many types
        if text.startswith(("amqp://", "amqps://")):
            return [pika.URLParameters(url) for url in re.split(r",\s*(?=amqps?://)", text)]
    raise argparse.ArgumentTypeError("expected amqp://USER:PASSWORD@HOST:PORT/VHOST, special characters as %XX")


def parse_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options of the parser, and those that both scripts have."""
    add = parser.add_argument
    add("--url", dest="urls", type=parse_urls, default=os.environ.get("AMQP_URL") or URL, help="URL[,URL]; or AMQP_URL")
    add("-q", "--queue", metavar="NAME", help=f"default without -e: {QUEUE}")
    add("-e", "--exchange", metavar="NAME", help="must exist, unless -t is given")
    add("-t", "--type", choices=["direct", "fanout", "topic", "headers"], help="declare the exchange with this type")
    add("-H", "--header", action="append", default=[], metavar="KEY=VALUE", help="repeatable")
    add("--timeout", type=float, default=TIMEOUT, metavar="SECONDS", help="without progress; default: %(default)g")
    add("-v", "--verbose", action="store_true", help="more on stderr")
    options = parser.parse_args(argv)
    if "" in (options.queue, options.exchange):
        parser.error("-q and -e: expected a name")
    if len(os.fsencode(re.sub(r"\.dead$", "", options.queue or ""))) > 250:
        parser.error("-q: the name, or NAME.dead, is longer than AMQP's 255 bytes")
    if not all("=" in text for text in options.header):
        parser.error("-H: expected KEY=VALUE")
    return options


class Consumer:
    """Runs `handle` in a thread of its own, and serves the connection meanwhile."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.remaining, self.worker = options, options.count, futures.ThreadPoolExecutor(max_workers=1)
        self.stopping, self.last_progress, self.last_success, self.failures_in_a_row = False, time.monotonic(), 0.0, 0
        self.ended_by: BaseException | None = None  # what `handle` raised to end the program

    def stop(self, signal_number: int = 0, *_: Any) -> None:
        """Stop after the message in hand; Ctrl-C while stopping ends the program at once."""
        if self.stopping and signal_number == signal.SIGINT:
            os._exit(130)
        self.stopping = True

    def run(self) -> None:
        """Consume until told to stop. Raises one of ERRORS if the broker refuses, or is away for --timeout."""
        while self.remaining and not self.stopping:
            try:
                with connect(self.last_progress, self.options) as connection:
                    self.consume(declare(connection, self.options))
            except OUTAGES as error:
                next_try = time.monotonic() + raise_or_delay(error, self.last_progress, self.options)
                while not self.stopping and time.monotonic() < next_try:
                    time.sleep(0.1)
        if self.ended_by:
            raise self.ended_by

    def consume(self, channel: BlockingChannel) -> None:
        """Have messages handled until told to stop; then give back the rest."""
        connection, queue = channel.connection, bind(channel, self.options)
        waiting: list[Any] = []  # method, properties and body of each message that is to be handled
        held: dict[int, Any] = {}  # delivery tags of what failed: when it is due, and how often it was returned
        channel.basic_qos(prefetch_count=min(self.options.prefetch, self.options.count))
        tag = channel.basic_consume(queue=queue, on_message_callback=lambda _, *delivery: waiting.append(delivery))
        try:
            while self.remaining and not self.stopping:
                self.give_back(channel, held)
                self.fetch(connection, waiting)
                future = self.worker.submit(self.work, waiting)
                while not futures.wait([future], timeout=0.1).done:
                    connection.process_data_events()
                if not channel.consumer_tags:  # pika empties it when the broker cancels, or closes the channel
                    raise ConsumerCancelled("consumer cancelled: queue deleted, or a message took longer than allowed")
                self.settle(channel, held, *future.result())
                if self.options.drain and not waiting and is_drained(channel, queue, waiting):
                    self.stopping = True
            connection.sleep(0.1)  # let what is in flight arrive: basic_cancel would reject it, so count it as failed
            channel.basic_cancel(consumer_tag=tag)
            for delivery_tag in held:
                channel.basic_reject(delivery_tag=delivery_tag, requeue=True)  # failed, which x-delivery-limit counts
            channel.basic_nack(delivery_tag=0, multiple=True, requeue=True)  # not tried; since 4.3, this is not counted
        finally:
            waiting.clear()  # after an outage, the worker may still be busy: it stops after the message in hand
            self.last_progress = time.monotonic()

    def fetch(self, connection: pika.BlockingConnection, waiting: list[Any]) -> None:
        """Take messages until more than half the prefetch is waiting, or no more come (in 0.2 s, if none is waiting)."""
        before = -1
        while before < len(waiting) <= self.options.prefetch // 2:  # each round brings some
            before = len(waiting)
            connection.process_data_events(time_limit=0 if waiting else 0.2)

    def work(self, waiting: list[Any]) -> tuple[list[int], list[Any]]:
        """Handle messages; return the delivery tags of the handled, and method, properties and error of the failed."""
        handled: list[int] = []
        failed: list[Any] = []
        end, enough = time.monotonic() + 0.1, self.options.prefetch / 2  # a short batch, so that acks are not late
        while waiting and self.remaining and not self.stopping and len(handled) < enough and time.monotonic() < end:
            method, properties, body = waiting.pop(0)
            if self.options.verbose:
                log.info("%s %s", method, properties)
            try:
                if handle(method, properties, body) is not None:
                    sys.exit("error: handle must return None, so it must not be async, nor a generator")
                sys.stdout.flush()
                handled.append(method.delivery_tag)
                self.last_success, self.failures_in_a_row = time.monotonic(), 0
            except SystemExit as error:
                self.ended_by, self.stopping = error, True
            except BaseException as error:  # asyncio.CancelledError is not an Exception
                log.error("error: message %r: %.300r", properties.message_id, error, exc_info=self.options.verbose)
                failed.append((method, properties, error))
                self.failures_in_a_row += 1
            self.remaining -= 1
        return handled, failed

    def settle(self, channel: BlockingChannel, held: dict[int, Any], handled: list[int], failed: list[Any]) -> None:
        """Acknowledge what was handled. Of what failed, reject the hopeless, and hold the rest until it is due."""
        private, dead = not self.options.queue, str(self.options.queue).endswith(".dead")
        for method, properties, error in failed:
            tag, headers = method.delivery_tag, properties.headers or {}
            if (isinstance(error, Reject) and not dead) or (private and method.redelivered):
                channel.basic_reject(delivery_tag=tag, requeue=False)
                if private:
                    log.error("error: message %r is dropped: a private queue has no NAME.dead", properties.message_id)
            else:  # hold it 0.2 s, and from the second time on 1 to 5 s; but 0.2 s where RabbitMQ 4.3 delays it
                count, delayed_by_broker = headers.get("x-delivery-count", 0), "x-acquired-count" in headers
                delay = min(max(count, 1), 5) if method.redelivered and not delayed_by_broker else 0.2
                held[tag] = time.monotonic() + delay, count
        for tag in handled if held else handled[-1:]:  # if none is held, the last acknowledges all before it, too
            channel.basic_ack(delivery_tag=tag, multiple=not held)

    def give_back(self, channel: BlockingChannel, held: dict[int, Any]) -> None:
        """Return what is due to the queue. While others succeed, also return early what fills over half of the prefetch.

        Before RabbitMQ 4.3, it comes back at once. After eight failures in a row for each held message, all seem to fail:
        then each waits, with twelve of twenty tries left for a minute. With a prefetch of 1 to 3, all can go in a second.
        """
        now, limit = time.monotonic(), 8 * (len(held) if self.options.prefetch > 3 else 10)  # 1 to 3 fill at once
        for tag, (due, count) in sorted(held.items(), key=lambda item: item[1]):
            crowded = 2 * len(held) > self.options.prefetch and now < self.last_success + 1
            if due <= now or (crowded and (self.failures_in_a_row <= limit or count > 8)):  # > 8: likely bad
                channel.basic_reject(delivery_tag=tag, requeue=True)
                del held[tag]


def is_drained(channel: BlockingChannel, queue: str, waiting: list[Any]) -> bool:
    """Whether no message is ready or on its way. Asked twice, because the first answer can overtake messages."""
    ready = [channel.queue_declare(queue=queue, passive=True).method.message_count for _ in range(2)]
    channel.connection.process_data_events()
    return not any(ready) and not waiting


def bind(channel: BlockingChannel, options: argparse.Namespace) -> str:
    """Bind the queue, or a private one, to the exchange, if there is one; return its name."""
    queue = str(options.queue or channel.queue_declare(queue="", exclusive=True).method.queue)
    if options.exchange:
        arguments = {"x-match": options.match, **dict(text.split("=", 1) for text in options.header)}
        for key in options.routing_key or ["#", ""]:  # any key at a topic exchange, no key at a direct one
            channel.queue_bind(queue=queue, exchange=options.exchange, routing_key=key, arguments=arguments)
    return queue


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-r", "--routing-key", action="append", metavar="KEY", help="of the binding; repeatable")
    parser.add_argument("--match", choices=["all", "any"], default="all", help="how many must match; default: all")
    parser.add_argument("-c", "--count", type=int, default=float("inf"), metavar="N", help="stop after N messages")
    parser.add_argument("--drain", action="store_true", help="stop when the queue gives no more")
    parser.add_argument("--prefetch", type=int, default=PREFETCH, metavar="N", help="default: %(default)s")
    options = parse_options(parser, argv)
    if not options.exchange and (options.type or options.routing_key or options.header):
        parser.error("-t, -r and -H need -e")
    if options.count < 1 or not 1 <= options.prefetch <= 65535:
        parser.error("--count: at least 1; --prefetch: 1 to 65535")
    if sys.stdout is None:
        parser.error("standard output is closed")
    options.queue = options.queue or (None if options.exchange else QUEUE)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    consumer = Consumer(parse(argv))
    old = {number: signal.signal(number, consumer.stop) for number in (signal.SIGINT, signal.SIGTERM)}
    os.register_at_fork(after_in_child=lambda: [signal.signal(*item) for item in old.items()])  # so SIGTERM ends forks
    try:
        consumer.run()
        return 0
    except Exception as error:
        log.error("error: %s", describe(error, consumer.options), exc_info=consumer.options.verbose)
        return 1
    finally:
        consumer.worker.shutdown()  # waits for `handle`
        for number, handler in old.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    logging.basicConfig(format=f"{os.path.basename(__file__)}: %(message)s", level=logging.INFO)
    logging.getLogger("pika").setLevel(logging.CRITICAL + 1)  # it logs seven errors for one refused connection
    sys.exit(main())
