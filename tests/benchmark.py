"""How fast the pair is, beside pika as one would use it first: python tests/benchmark.py [--quick] [--broker ...]

Everything measured is a process of its own, its start counted, in rounds that alternate. For the memory and the rates,
the messages are persistent, in a quorum queue; a figure is the median of the rounds, with the lowest and highest.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import deque
from pathlib import Path
from typing import Any, Callable, Sequence

import pika

import broker as brokers
from broker import ROOT, Broker, peak_memory

Command = Sequence[str]


class Benchmark:
    def __init__(self, broker: Broker, rounds: int, directory: Path) -> None:
        self.url, self.rounds, self.directory = broker.url, rounds, directory
        self.environment = {**os.environ, "AMQP_URL": broker.url}

    def baseline(self, name: str, queue: str, *arguments: object) -> Command:
        return [sys.executable, str(ROOT / "tests" / "baselines.py"), name, self.url, queue, *map(str, arguments)]

    def script(self, name: str, queue: str, *arguments: object) -> Command:
        return [sys.executable, str(ROOT / f"{name}.py"), "-q", queue, *map(str, arguments)]

    def lines(self, count: int, size: int) -> Path:
        """A file of so many numbered lines of so many bytes."""
        path = self.directory / f"{count}x{size}"
        if not path.exists():
            with path.open("wb") as file:
                file.writelines(b"%0*d\n" % (size, number) for number in range(count))
        return path

    def seconds(self, *commands: Command, stdin: Path = Path(os.devnull)) -> float:
        """How long the commands take, side by side. If one fails, so does the benchmark."""
        start = time.perf_counter()
        with stdin.open("rb") as source, open(self.directory / "errors", "wb") as errors:
            processes = [
                subprocess.Popen(command, stdin=source, stdout=subprocess.DEVNULL, stderr=errors, env=self.environment)
                for command in commands
            ]
            failed = [process for process in processes if process.wait()]
        duration = time.perf_counter() - start
        if failed:
            sys.exit(f"{commands}: {(self.directory / 'errors').read_text()}")
        return duration

    def measure(self, contestants: dict[str, Callable[[str], Any]]) -> dict[str, list[Any]]:
        """What each contestant returns for a queue of its own, round by round."""
        found: dict[str, list[Any]] = {name: [] for name in contestants}
        order = deque(contestants)
        for _ in range(self.rounds):
            for name in order:
                queue = f"benchmark-{uuid.uuid4().hex}"
                found[name].append(contestants[name](queue))
                with pika.BlockingConnection(pika.URLParameters(self.url)) as connection:
                    channel = connection.channel()
                    channel.queue_delete(queue)
                    channel.queue_delete(f"{queue}.dead")
            order.rotate()  # because the broker still tidies up after the one before
        return found

    def publishing(self, count: int, size: int = 100) -> dict[str, list[float]]:
        """Messages a second. The one that waits for each confirmation publishes a tenth, because it takes so long."""

        def rate(count: int, command: Command) -> float:
            return count / self.seconds(command, stdin=self.lines(count, size))

        return self.measure({
            "pika, unconfirmed": lambda queue: rate(count, self.baseline("publish", queue)),
            "pika, each confirmed": lambda queue: rate(count // 10, self.baseline("publish_confirmed", queue)),
            "producer.py": lambda queue: rate(count, self.script("producer", queue, "-")),
        })  # fmt: skip

    def consuming(self, count: int, prefetch: int, size: int = 100, consumers: int = 1) -> dict[str, list[float]]:
        """Messages a second, of a queue that held them all before."""
        share = count // consumers

        def rate(queue: str, command: Command) -> float:
            self.seconds(self.script("producer", queue, "-"), stdin=self.lines(count, size))
            return count / self.seconds(*[command] * consumers)

        contestants = {
            "pika, automatic acknowledgement": lambda queue: rate(queue, self.baseline("consume", queue, share, 0)),
            "pika, each acknowledged": lambda queue: rate(queue, self.baseline("consume", queue, share, prefetch)),
            "consumer.py": lambda queue: rate(queue, self.script("consumer", queue, "--prefetch", prefetch, "-c", share)),
        }  # fmt: skip
        if consumers > 1:  # automatically, the first takes all, and throws away what is not its share
            del contestants["pika, automatic acknowledgement"]
        return self.measure(contestants)

    def one_message(self) -> dict[str, list[float]]:
        """Milliseconds, to a queue that exists."""

        def milliseconds(command: Command) -> float:
            self.seconds(command)
            return 1000 * statistics.median(self.seconds(command) for _ in range(5))

        return self.measure({
            "pika, shortest script": lambda queue: milliseconds(self.baseline("hello", queue)),
            "producer.py": lambda queue: milliseconds(self.script("producer", queue)),
        })  # fmt: skip

    def latency(self, count: int) -> dict[str, list[list[float]]]:
        """Milliseconds from writing a line to the producer to reading it from the consumer, 100 lines a second."""

        def times(producer: Command, consumer: Command) -> list[float]:
            found = []
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            with subprocess.Popen(producer, env=self.environment, **pipes) as writer:
                with subprocess.Popen(consumer, env=self.environment, **pipes) as reader:
                    assert writer.stdin and reader.stdout
                    for number in range(-10, count):
                        start = time.perf_counter()
                        writer.stdin.write(b"%d\n" % number)
                        writer.stdin.flush()
                        assert reader.stdout.readline() == b"%d\n" % number
                        if number >= 0:  # the others waited for both to start
                            found.append(1000 * (time.perf_counter() - start))
                        time.sleep(max(0.0, start + 0.01 - time.perf_counter()))
                    reader.kill()
                writer.stdin.close()
            return found

        return self.measure({
            "pika, each confirmed; callback": lambda queue: times(
                self.baseline("publish_confirmed", queue), self.baseline("consume_callback", queue)
            ),
            "producer.py; consumer.py": lambda queue: times(
                self.script("producer", queue, "-"), self.script("consumer", queue)
            ),
        })  # fmt: skip

    def memory(self, count: int) -> dict[str, float]:
        """MB that each script has at most, for so many lines."""
        queue, found = f"benchmark-{uuid.uuid4().hex}", {}
        commands = {"producer": ["-"], "consumer": ["--drain", "--prefetch", "100"]}
        for name, arguments in commands.items():
            with self.lines(count, 100).open("rb") as source:
                process = subprocess.Popen(
                    self.script(name, queue, *arguments), stdin=source, stdout=subprocess.DEVNULL, env=self.environment
                )
            while process.poll() is None:
                with contextlib.suppress(OSError, IndexError):  # it has ended just now
                    found[f"{name}.py"] = peak_memory(process.pid) / 1024
                time.sleep(0.01)
        return found


def row(*cells: object) -> None:
    print(
        "| " + " | ".join(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |", flush=True
    )


def head(*cells: str) -> None:
    print()
    row(*cells)
    row(*["---"] * len(cells))


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f})"


def table(title: str, unit: str, found: dict[str, list[float]], ours: str) -> None:
    """A row each, with the ratio of ours to it."""
    median = statistics.median(found[ours])
    for name, values in found.items():
        row(title, name, GUARANTEES[name], spread(values) + unit, median / statistics.median(values))


GUARANTEES = {
    "pika, unconfirmed": "none",
    "pika, each confirmed": "confirmed, routed",
    "producer.py": "confirmed, routed, sent again after an outage",
    "pika, automatic acknowledgement": "none",
    "pika, each acknowledged": "acknowledged after handling",
    "consumer.py": "acknowledged after handling, alive meanwhile, goes on after an outage",
    "pika, shortest script": "confirmed",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute's worth: fewer messages, no growth")
    parser.add_argument("--broker", default="", metavar="docker|local|URL", help="default: docker, else local")
    options = parser.parse_args()
    count, rounds = (10_000, 3) if options.quick else (100_000, 5)
    broker = brokers.choose(options.broker)
    try:
        broker.start()
        with tempfile.TemporaryDirectory() as directory:
            report(Benchmark(broker, rounds, Path(directory)), count, options.quick)
        machine = f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}"
        print(f"\n{machine}, pika {pika.__version__}, RabbitMQ {'.'.join(map(str, broker.version()))}")
    finally:
        broker.remove()


def report(benchmark: Benchmark, count: int, quick: bool) -> None:
    head("what", "who", "guarantees", "median (lowest-highest)", "ours to it")
    table(f"publish {count:,}", "/s", benchmark.publishing(count), "producer.py")
    for prefetch in 100, 10:
        table(f"consume {count:,}, prefetch {prefetch}", "/s", benchmark.consuming(count, prefetch), "consumer.py")
    table("publish one", " ms", benchmark.one_message(), "producer.py")
    head("latency, 100 lines/s", "median, ms", "99th percentile, ms")
    for name, rounds in benchmark.latency(200 if quick else 500).items():
        cuts = [statistics.quantiles(times, n=100) for times in rounds]
        row(name, *(statistics.median(cut[percent - 1] for cut in cuts) for percent in (50, 99)))
    head("memory", "10,000 lines, MB", f"{10 * count:,} lines, MB")
    small, large = benchmark.memory(10_000), benchmark.memory(10 * count)
    for name in small:
        row(name, small[name], large[name])
    if quick:
        return
    names = "producer.py", "pika, each confirmed", "consumer.py", "pika, each acknowledged"
    head("how it grows", *names)
    benchmark.rounds = 1
    sizes = (10_000, 100), (100_000, 100), (1_000_000, 100), (100_000, 10), (100_000, 1_000), (5_000, 100_000)
    for messages, size in sizes:
        rates = {**benchmark.publishing(messages, size), **benchmark.consuming(messages, 100, size)}
        row(f"{messages:,} messages of {size:,} bytes", *(f"{rates[name][0]:,.0f}/s" for name in names))
    for consumers in 1, 2, 4:
        rates = benchmark.consuming(100_000, 100, consumers=consumers)
        row(f"{consumers} consumers", "", "", *(f"{rates[name][0]:,.0f}/s" for name in names[2:]))


if __name__ == "__main__":
    main()
