"""What the two files promise about themselves."""

from __future__ import annotations

import subprocess
import sys

import consumer
import producer
from broker import ROOT


def shared(name: str) -> str:
    """The text that both scripts have, which begins and ends where its first comment says."""
    text = (ROOT / f"{name}.py").read_text()
    return text[text.index("# From here to `common_options`") : text.index("\nclass ")]


def test_what_both_scripts_need_is_the_same_text() -> None:
    assert "def common_options" in shared("producer")
    assert shared("producer") == shared("consumer")


def test_both_scripts_declare_the_same_queue() -> None:
    # RabbitMQ would refuse the second declaration otherwise.
    assert producer.QUEUE == consumer.QUEUE
    assert producer.URL == consumer.URL
    assert producer.QUEUE_ARGUMENTS == consumer.QUEUE_ARGUMENTS
    assert producer.DEAD_QUEUE_ARGUMENTS == consumer.DEAD_QUEUE_ARGUMENTS


def test_an_import_changes_nothing_in_the_program() -> None:
    program = """
import logging, signal, sys, pika
def state():
    loggers = [logging.getLogger(name) for name in (None, "pika", "producer", "consumer")]
    signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return [(log.level, log.handlers[:]) for log in loggers], signals, sys.stdout, sys.stdout.write, sys.excepthook
before = state()
import consumer, producer
assert state() == before
consumer.main(["--timeout", "0", "--url", "amqp://127.0.0.1:1"])
producer.main(["--timeout", "0", "--url", "amqp://127.0.0.1:1"])
assert state() == before
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
