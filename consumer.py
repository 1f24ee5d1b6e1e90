"""Handle the messages of a RabbitMQ queue, one after the other, until told to stop.

    python consumer.py                      write each message to standard output, one a line
    python consumer.py --drain > messages   the same, until the queue is empty

Guaranteed: a message is acknowledged after `handle` returned; whatever breaks before, it comes again. One
that `handle` fails on comes again later, and is moved to the queue NAME.dead in the end. The connection stays
alive while `handle` works, for as long as the broker allows (30 minutes). An outage is waited for.
Not guaranteed: that a message comes only once, nor the order of those that come again. A private queue (-e
without -q) misses what is sent during an outage, and loses what `handle` fails on twice.

To make it yours, replace `handle`. The other half of the pair is producer.py.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import random
import re
import signal
import ssl
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Iterator, Sequence, Tuple
from urllib.parse import urlsplit

import pika
import pika.exceptions
from pika.adapters.blocking_connection import BlockingChannel
from pika.adapters.utils.connection_workflow import AMQPConnectorException

URL = "amqp://guest:guest@localhost:5672/%2F"
QUEUE = "hello"
CONNECT_TIMEOUT = math.inf  # seconds; a service that is restarted by something else may want less
PREFETCH = 10  # 1 for jobs of minutes, so that every consumer has one; 100 to 300 for the highest rate
QUEUE_ARGUMENTS = {
    "x-queue-type": "quorum",
    "x-delivery-limit": 20,  # a message that fails is delivered again as many times, then moved to NAME.dead;
    "x-delayed-retry-type": "failed",  # RabbitMQ 4.3 and later wait before each time,
    "x-delayed-retry-min": 1000,  # ms for each failure so far,
    "x-delayed-retry-max": 60000,  # ms at most
}
Message = Tuple[pika.spec.Basic.Deliver, pika.BasicProperties, bytes]


def handle(method: pika.spec.Basic.Deliver, properties: pika.BasicProperties, body: bytes) -> None:
    """Return when the message is done with. An exception has it delivered again later; Stop ends the program."""
    line = body + b"\n"
    try:
        while line:  # not buffered, because what is acknowledged has to be out; a pipe may take a part
            line = line[os.write(1, line) :]
    except BrokenPipeError:
        raise Stop from None  # nobody reads on
    except OSError as error:
        raise Stop(f"standard output: {error.strerror}") from error


# What follows, down to `set_up`, is the same in producer.py and consumer.py.
CONNECTION_ERRORS = (pika.exceptions.AMQPError, AMQPConnectorException, OSError)
HINTS = {  # what to do about a reply that would be the same the next time
    403: "check user, password and permissions; names that start with amq. are reserved",
    404: "-t TYPE declares an exchange",
    405: "it belongs to another connection",
    406: "the settings of what has this name, or the message, do not fit",
    530: "check the virtual host in the URL, and that the user may use it",
}
log = logging.getLogger(__name__)


class Stop(Exception):
    """Ends the program; the text, if there is one, says what was not done and why."""


def declare_queue(connection: pika.BlockingConnection, queue: str) -> None:
    """The queue and NAME.dead exist; what existed with other settings is used as it is."""
    dead = queue + ".dead"
    # Only this strategy loses nothing on the way, and it needs this kind of overflow.
    # https://www.rabbitmq.com/docs/quorum-queues#activating-at-least-once-dead-lettering
    to_dead = {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
    to_dead.update({"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead})
    # NAME.dead has to keep what it gets, but RabbitMQ 4 drops after 20 deliveries where nothing else is said.
    for name, arguments in (queue, to_dead), (dead, {"x-delivery-limit": 2**31 - 1}):
        channel = connection.channel()
        try:
            channel.queue_declare(queue=name, durable=True, arguments={**QUEUE_ARGUMENTS, **arguments})
            channel.close()
        except pika.exceptions.ChannelClosedByBroker as error:
            if error.reply_code != 406:
                raise
            log.warning("warning: queue %s is used as it is: %s", name, error.reply_text)
            return


def backoff(timeout: float) -> Iterator[float]:
    """Seconds to wait before each try, growing to 5, with jitter; no more once `timeout` seconds have passed."""
    deadline, longest = time.monotonic() + timeout, 0.2
    while time.monotonic() < deadline:
        yield min(longest * random.uniform(0.5, 1), deadline - time.monotonic())
        longest = min(2 * longest, 5)


def pause(error: BaseException, delays: Iterator[float], options: argparse.Namespace) -> None:
    """Log the error and wait before the next try; raise Stop if there is none left, or it would be useless."""
    cause: Any = error
    while isinstance(getattr(cause, "exception", cause.args and cause.args[0]), BaseException):
        cause = getattr(cause, "exception", cause.args[0])  # pika wraps what the socket said, twice
    text = getattr(cause, "reply_text", "") or getattr(cause, "strerror", "") or str(cause) or type(cause).__name__
    code = getattr(cause, "reply_code", 0)
    if isinstance(cause, (pika.exceptions.ProbableAuthenticationError, pika.exceptions.ProbableAccessDeniedError)):
        code = 403 if "(403)" in text else 530 if "(530)" in text else 0  # pika keeps the reply as text only
    # Two replies pass: a full queue (tx.commit), and a handler slower than the broker's patience.
    final = code in HINTS and "partial tx" not in text and "timed out" not in text
    hint = HINTS[code] if final else ""
    if isinstance(cause, ssl.SSLCertVerificationError):
        final, hint = True, "SSL_CERT_FILE=FILE adds a private CA"
    elif isinstance(cause, ConnectionRefusedError):
        hint = "start a broker with: docker compose up -d --wait"
    text = ",".join(f"{broker.host}:{broker.port}" for broker in options.url) + f": {text}" + (hint and f"; {hint}")
    log.debug("", exc_info=error)
    delay = None if final else next(delays, None)
    if delay is None:
        raise Stop(text if final else f"{text}; gave up after {options.connect_timeout:g} s") from error
    log.warning("%s; next try in %.1f s", text, delay)
    time.sleep(delay)


def broker_urls(text: str) -> list[pika.URLParameters]:
    """The connection parameters of each URL. Errors do not repeat the URL, because of the password in it."""
    urls = re.split(",(?=amqps?://)", text)
    try:
        for url in urls:
            parts = urlsplit(url.partition("?")[0])
            pika.URLParameters(parts.geturl())
            if parts.scheme not in ("amqp", "amqps") or parts.fragment or parts.path.count("/") > 1:
                raise ValueError
    except (ValueError, TypeError):
        form = "expected amqp://USER:PASSWORD@HOST:PORT/VHOST, with special characters as %XX (the vhost / is %2F)"
        raise argparse.ArgumentTypeError(form) from None
    try:
        return [pika.URLParameters(url) for url in urls]
    except Exception as error:  # of many kinds, depending on the option
        raise argparse.ArgumentTypeError(str(error)) from None


def short_string(text: str) -> str:
    if len(text.encode()) > 250:  # AMQP allows 255; `.dead` has to fit
        raise argparse.ArgumentTypeError("longer than 250 bytes")
    return text


def header(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise argparse.ArgumentTypeError("expected KEY=VALUE")
    value.encode()  # raises ValueError for what is not text
    return short_string(key), value


def seconds(text: str) -> float:
    if not float(text) >= 0:
        raise ValueError
    return float(text)


def common_options() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    url = os.environ.get("AMQP_URL") or URL
    add("--url", type=broker_urls, default=url, help="URL[,URL...], tried in order; else AMQP_URL, else localhost")
    add("-q", "--queue", type=short_string, help=f"default: {QUEUE}")
    add("-e", "--exchange", type=short_string, help="has to exist, unless -t is given")
    add("-t", "--type", choices=["direct", "fanout", "topic", "headers"], help="declare the exchange, of this type")
    add("-H", "--header", type=header, action="append", default=[], metavar="KEY=VALUE", help="repeatable")
    wait = "how long an unreachable broker is tried for; default: %(default)g"
    add("--connect-timeout", type=seconds, default=CONNECT_TIMEOUT, metavar="SECONDS", help=wait)
    add("-v", "--verbose", action="store_true", help="more on stderr")
    return parser


def set_up(options: argparse.Namespace) -> None:
    """One line on stderr for each event; SIGTERM means what Ctrl-C means."""
    level = logging.DEBUG if options.verbose else logging.INFO
    logging.basicConfig(format=f"{os.path.basename(__file__)}: %(message)s", level=level)
    logging.getLogger("pika").setLevel(logging.CRITICAL + 1)  # it has seven errors for one refused connection
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for broker in options.url:
        broker.stack_timeout = min(broker.stack_timeout, max(options.connect_timeout, 1))


class Consumer:
    """Has `handle` work in a thread of its own, and serves the connection meanwhile."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.queue = options.queue
        self.left = options.count or sys.maxsize  # messages still to be taken from the queue
        self.worker = ThreadPoolExecutor(max_workers=1)
        self.consuming = False
        self.stopping = threading.Event()
        self.reason = ""  # why `handle` stopped the program

    def stop(self, *_signal: Any) -> None:
        """Stop after the message in hand; the second time, at once."""
        if self.stopping.is_set():
            os._exit(130)  # the only way not to wait for `handle`
        self.stopping.set()
        if not self.consuming:
            raise Stop

    def run(self) -> None:
        """Consume until told to stop; raises Stop if the broker refuses, or is away for `connect_timeout`."""
        delays = backoff(self.options.connect_timeout)
        while not self.stopping.is_set():
            try:
                with pika.BlockingConnection(self.options.url) as connection:
                    self.declare(connection)
                    for _ in self.consume(connection):
                        delays = backoff(self.options.connect_timeout)
                    return
            except CONNECTION_ERRORS as error:
                if not self.stopping.is_set():
                    pause(error, delays, self.options)

    def declare(self, connection: pika.BlockingConnection) -> None:
        """The queue exists, and is bound as the options say."""
        options = self.options
        if options.queue:
            declare_queue(connection, options.queue)
        if options.exchange:
            channel = connection.channel()
            channel.exchange_declare(options.exchange, options.type or "direct", passive=not options.type, durable=True)
            if not options.queue:
                if self.queue:
                    log.warning("warning: what was sent during the outage is missed, because the queue was private")
                self.queue = channel.queue_declare("", exclusive=True).method.queue
            arguments = {"x-match": options.match or "all", **dict(options.header)} if options.header else None
            # Without -r, all messages; without -t, the type that this depends on is not known.
            default = {"topic": ["#"], None: ["", "#"]}.get(options.type, [""])
            for routing_key in options.routing_key or default:
                channel.queue_bind(self.queue, options.exchange, routing_key, arguments)
            channel.close()

    def consume(self, connection: pika.BlockingConnection) -> Iterator[None]:
        """Handle messages until told to stop; yields now and then, which shows that the broker is well."""
        channel = connection.channel()
        channel.basic_qos(prefetch_count=min(self.options.prefetch, self.left))
        waiting: list[Message] = []
        batch: deque[Message] = deque()  # what the worker has to do
        outcomes: deque[tuple[pika.spec.Basic.Deliver, bool]] = deque()  # what it has done: handled, or failed
        cancelled = False
        self.consuming = True
        try:
            while not cancelled:
                self.settle(channel, outcomes)
                waiting += self.receive(channel, timeout=0 if waiting else 0.2)
                batch.extend(waiting[: self.left])
                del waiting[: self.left]
                self.left -= len(batch)
                if self.stopping.is_set() or not self.left or (not batch and self.is_drained(channel)):
                    # First receive what is on its way: pika rejects what arrives while it cancels, and the
                    # broker counts that as a failure of the message.
                    while self.receive(channel, timeout=0.05):
                        pass
                    channel.cancel()
                    cancelled = True
                job = self.worker.submit(self.work, batch, outcomes)
                while wait([job], timeout=0.1).not_done:
                    if cancelled:
                        connection.process_data_events()
                    else:
                        waiting += self.receive(channel, timeout=0)
                    self.settle(channel, outcomes)
                yield
            self.settle(channel, outcomes)
            channel.basic_nack(delivery_tag=0, multiple=True, requeue=True)  # gives back what was not handled
        finally:
            self.consuming = False
            batch.clear()  # the broker delivers these again

    def receive(self, channel: BlockingChannel, timeout: float) -> list[Message]:
        """The messages that have been delivered, after `timeout` seconds at most."""
        received: list[Message] = []
        for method, properties, body in channel.consume(self.queue, inactivity_timeout=timeout):
            if method and properties and body is not None:
                received.append((method, properties, body))
            if not channel.get_waiting_message_count():
                return received
        raise pika.exceptions.ConsumerCancelled(
            "consumer cancelled: queue deleted, or a handler slower than the broker allows"
        )

    def is_drained(self, channel: BlockingChannel) -> bool:
        """The queue is empty, and was to be emptied."""
        if not self.options.drain:
            return False
        ready = channel.queue_declare(self.queue, passive=True).method.message_count
        return not ready and not channel.get_waiting_message_count()

    def work(self, batch: deque[Message], outcomes: deque[tuple[pika.spec.Basic.Deliver, bool]]) -> None:
        """Handle the messages of the batch, as long as there are any, in the worker's thread."""
        while batch and not self.stopping.is_set():
            method, properties, body = batch.popleft()
            log.debug("%s %s", method, properties)
            try:
                handle(method, properties, body)
                sys.stdout.flush()  # of a `handle` that prints
                outcomes.append((method, True))
            except Stop as stop:
                self.reason = str(stop)
                self.stopping.set()
            except Exception as error:
                log.error("error: message %s failed: %r", properties.message_id, error)
                log.debug("", exc_info=error)
                outcomes.append((method, False))

    def settle(self, channel: BlockingChannel, outcomes: deque[tuple[pika.spec.Basic.Deliver, bool]]) -> None:
        """Acknowledge what was handled, all with one frame; reject what failed."""
        handled = 0
        while outcomes:
            method, success = outcomes.popleft()
            if success:
                handled = method.delivery_tag
            else:
                # Not basic_nack, which RabbitMQ 4.3 does not count. Nothing counts in a private queue: drop it there.
                requeue = bool(self.options.queue) or not method.redelivered
                channel.basic_reject(method.delivery_tag, requeue=requeue)
        if handled:
            channel.basic_ack(handled, multiple=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common_options()
    add = parser.add_argument
    add(
        "-r",
        "--routing-key",
        type=short_string,
        action="append",
        help="of a binding; repeatable; default: all messages",
    )
    add("--match", choices=["all", "any"], help="how many of the headers have to match; default: all")
    add("-c", "--count", type=int, metavar="N", help="stop after N messages")
    add("--drain", action="store_true", help="stop when the queue is empty")
    add("--prefetch", type=int, default=PREFETCH, metavar="N", help="messages taken in advance; default: %(default)s")
    options = parser.parse_args(argv)
    for mistake, made in {
        "a queue or an exchange has no empty name": "" in (options.queue, options.exchange),
        "-t, -r and -H need -e": not options.exchange and (options.type or options.routing_key or options.header),
        "-H needs an exchange of type headers": options.header and options.type not in (None, "headers"),
        "--match needs -H": options.match and not options.header,
        "--count: at least 1": options.count is not None and options.count < 1,
        "--prefetch: 1 to 65535": not 1 <= options.prefetch <= 65535,
        "standard output is closed": sys.stdout is None,
    }.items():
        if made:
            parser.error(mistake)
    if not options.exchange:
        options.queue = options.queue or QUEUE
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    set_up(options)
    consumer = Consumer(options)
    signal.signal(signal.SIGINT, consumer.stop)
    signal.signal(signal.SIGTERM, consumer.stop)
    try:
        consumer.run()
    except Stop as stop:
        consumer.reason = str(stop)
    if consumer.reason:
        log.error("error: %s", consumer.reason)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
