"""Fixtures of the long suite: a cluster, random numbers, and a broker that is up again after each test."""

from __future__ import annotations

import random
from typing import Iterator

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
