"""What happens to a broker, and a stream of messages that shows whether any is lost."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from typing import Any

from broker import Broker, ContainerBroker, eventually
from conftest import Script, Start

HANDLE = "def handle(method, properties, body): print(properties.message_id, body.decode())"


def inflict(broker: Any, number: signal.Signals, *command: str) -> None:
    if isinstance(broker, ContainerBroker):
        broker.compose(*command, broker.service)
    else:
        broker.signal(number)


def stop(broker: Broker) -> None:
    """In order, as a service manager does; `broker.start()` starts it again."""
    inflict(broker, signal.SIGTERM, "stop")


def kill(broker: Broker) -> None:
    inflict(broker, signal.SIGKILL, "kill", "-s", "SIGKILL")


def freeze(broker: Broker) -> None:
    inflict(broker, signal.SIGSTOP, "pause")


def thaw(broker: Broker) -> None:
    inflict(broker, signal.SIGCONT, "unpause")


def lines(first: int, last: int) -> bytes:
    return b"".join(b"%063d\n" % number for number in range(first, last + 1))


def pauses(script: Script) -> list[float]:
    """The pauses that the script announced, one line a try. It says nothing else, but why it waits and how it ended."""
    other = r"messages? published$|is the broker short of|warning: the queue is used as it is|; next try in \d\.\d s$"
    assert all(re.search(other, message) for message in script.messages), script.stderr
    return script.tries


def until_tried(*scripts: Script, times: int = 1) -> None:
    """Return when each of the scripts has announced that many tries to connect."""
    eventually(lambda: all(len(pauses(script)) >= times for script in scripts), what="they try to connect")


class Handled:
    """What consumers with HANDLE have written."""

    def __init__(self, *consumers: Script) -> None:
        self.consumers = [*consumers]

    @property
    def messages(self) -> list[tuple[int, bytes]]:
        """The number and the message id of each."""
        pairs = [line.split() for consumer in self.consumers for line in consumer.bodies]
        return [(int(number), message_id) for message_id, number in pairs]

    @property
    def numbers(self) -> list[int]:
        return [number for number, _ in self.messages]

    @property
    def count(self) -> int:
        return sum(consumer.stdout.count(b"\n") for consumer in self.consumers)

    def until(self, count: int) -> None:
        eventually(lambda: self.count >= count, timeout=120, what=f"{count} messages handled")


class Stream:
    """Numbered lines through a producer and a consumer, fifty every `pause` seconds, until it is ended."""

    def __init__(self, start: Start, broker: Broker, queue: str, url: str = "", pause: float = 0.02) -> None:
        self.start, self.broker, self.queue, self.url, self.pause = start, broker, queue, url, pause
        self.sent = 0
        self.consumer = start("consumer", "-q", queue, handle=HANDLE, url=url)
        self.producer = start("producer", "-q", queue, "-", url=url)
        self.handled = Handled(self.consumer)
        self.ended = threading.Event()
        self.feeder = threading.Thread(target=self.feed, daemon=True)
        self.feeder.start()

    @property
    def scripts(self) -> tuple[Script, Script]:
        return self.producer, self.consumer

    def feed(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # the producer was killed
            while not self.ended.wait(self.pause):
                self.producer.write(lines(self.sent + 1, self.sent + 50))
                self.sent += 50

    def flow(self, more: int) -> None:
        """Return when that many more messages have been handled."""
        try:
            self.handled.until(self.handled.count + more)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.producer.stderr}\n{self.consumer.stderr}") from None

    def end(self) -> None:
        """Return when nothing more is sent."""
        self.ended.set()
        self.feeder.join(timeout=120)
        assert not self.feeder.is_alive(), self.producer.stderr

    def account(self) -> None:
        """All that was sent was published and handled, and nothing is left; what came twice had the same message id."""
        self.end()
        assert self.producer.end() == 0, self.producer.stderr
        assert self.producer.messages[-1] == f"{self.sent} messages published"
        with contextlib.suppress(AssertionError):  # what is missing is said below
            eventually(lambda: len(set(self.handled.numbers)) == self.sent)
        assert self.consumer.stop() == 0, self.consumer.stderr

        lost = sorted(set(range(1, self.sent + 1)).difference(self.handled.numbers))
        assert not lost, f"{len(lost)} of {self.sent} published messages are lost: {lost[0]} to {lost[-1]}"
        eventually(self.drain, what="the queue is empty; a broker gives back late what a lost connection had in hand")
        assert len(set(self.handled.messages)) == self.sent
        assert self.broker.depth(f"{self.queue}.dead") == 0

    def drain(self) -> bool:
        """Handle what is left in the queue; whether it is empty then."""
        consumer = self.start("consumer", "-q", self.queue, "--drain", handle=HANDLE, url=self.url)
        assert consumer.end() == 0, consumer.stderr
        self.handled.consumers.append(consumer)
        return self.broker.depth(self.queue) == 0
