"""Fixtures of the long suite: a broker that is up again after each test, a user, a cluster, random numbers."""

from __future__ import annotations

import contextlib
import random
from typing import Callable, Iterator

import pytest

from broker import Broker
from long.cluster import Cluster, cluster_for


@pytest.fixture(autouse=True)
def running_again(broker: Broker, queue: str) -> Iterator[None]:
    """A test that fails while the broker is down is the only one to fail. It is up again before `queue` is deleted."""
    yield
    try:
        broker.connect().close()
    except Exception:
        broker.start()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers, the same again for the same --seed and test."""
    return random.Random(f"{request.config.getoption('--seed')} {request.node.name}")


Somebody = Callable[..., str]


@pytest.fixture
def somebody(own_broker: Broker) -> Iterator[Somebody]:
    """Give a user `somebody` these permissions, and return the URL, or another, with that user and its password."""
    own_broker.ctl("add_user", "somebody", "s3cret")

    def somebody(url: str = own_broker.url, configure: str = ".*", write: str = ".*", read: str = ".*") -> str:
        own_broker.ctl("set_permissions", "somebody", configure, write, read)
        return url.replace("guest:guest", "somebody:s3cret")

    yield somebody
    with contextlib.suppress(RuntimeError):  # the test has deleted it
        own_broker.ctl("delete_user", "somebody")


@pytest.fixture(scope="module")
def module_cluster(session_broker: Broker) -> Iterator[Cluster]:
    if not session_broker.ours:
        pytest.skip("needs a broker of its own kind, and --broker URL has none to offer")
    cluster = cluster_for(session_broker)
    try:
        yield cluster
    finally:
        cluster.remove()


@pytest.fixture
def cluster(module_cluster: Cluster) -> Cluster:
    """All nodes run, also after a test that failed while some were down."""
    module_cluster.start()
    return module_cluster
