"""Three nodes in one cluster: containers of one network, or local nodes with one Erlang cookie."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from broker import Broker, ContainerBroker, LocalBroker, free_ports

NODES = 3


class Cluster:
    """The nodes, each a Broker; the first is the one that the others join."""

    def __init__(self, nodes: list[Any]) -> None:
        self.nodes = nodes
        self.url = ",".join(node.url for node in nodes)

    def start(self) -> None:
        """Return when all nodes serve clients. Those that are down start together: each waits for those it has to join."""
        if isinstance(self.nodes[0], ContainerNode):
            self.nodes[0].compose("up", "-d", "--wait")  # at the same time, they would race for the network
            return
        down = [node for node in self.nodes if not node.is_running()]
        with ThreadPoolExecutor(NODES) as pool:
            list(pool.map(lambda node: node.start(), down))

    def leader(self, queue: str) -> Any:
        """The node that leads the quorum queue."""
        listed = self.nodes[0].ctl("list_queues", "name", "leader", "online", "--formatter", "json")
        [row] = [row for row in json.loads(listed) if row["name"] == queue]
        assert len(row["online"]) == NODES, row
        [node] = [node for node in self.nodes if node.node == row["leader"]]
        return node

    def remove(self) -> None:
        for node in reversed(self.nodes):
            node.remove()


class ContainerNode(ContainerBroker):
    """One service of cluster.yml."""

    def __init__(self, index: int, project: str, ports: list[int]) -> None:
        super().__init__(Path(__file__).with_name("cluster.yml"), f"rabbitmq{index}")
        self.node = f"rabbit@{self.service}"
        self.url = f"amqp://guest:guest@127.0.0.1:{ports[index]}/%2F"
        self.project = project
        self.command[3] = project
        self.environment.update({f"AMQP_PORT_{number}": str(port) for number, port in enumerate(ports)})


def cluster_for(broker: Broker) -> Cluster:
    """A cluster of the same kind as the broker."""
    if isinstance(broker, ContainerBroker):
        project, ports = f"{broker.project}-cluster", free_ports(NODES)
        return Cluster([ContainerNode(index, project, ports) for index in range(NODES)])
    nodes = [LocalBroker() for _ in range(NODES)]
    for node in nodes:
        with (node.home / "rabbitmq.conf").open("a") as configuration:
            configuration.write("cluster_formation.peer_discovery_backend = classic_config\n")
            for number, each in enumerate(nodes, 1):
                configuration.write(f"cluster_formation.classic_config.nodes.{number} = {each.node}\n")
        cookie = Path(node.home, ".erlang.cookie")
        cookie.write_text("PAIR")
        cookie.chmod(0o400)
    return Cluster(nodes)
