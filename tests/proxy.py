"""A TCP proxy between the scripts and the broker, whose lines can be cut, muted and refused."""

from __future__ import annotations

import contextlib
import socket
import threading
from urllib.parse import urlsplit


class Line:
    """One connection through the proxy."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.sockets = (client, server)
        self.muted = False
        for ends in (client, server), (server, client):
            threading.Thread(target=self.forward, args=ends, daemon=True).start()

    def forward(self, source: socket.socket, target: socket.socket) -> None:
        """Pass on what one end says, until it closes the line."""
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(65536)
                if self.muted:
                    return  # and leave both ends open
                if not data:
                    break
                target.sendall(data)
        if not self.muted:
            self.cut()

    def cut(self) -> None:
        for end in self.sockets:
            with contextlib.suppress(OSError):  # has been cut already
                end.shutdown(socket.SHUT_RDWR)  # ends the thread that reads from it, which `close` does not
            end.close()


class Proxy:
    """Listens on a port of its own, and forwards to the broker at a URL."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.target = (parts.hostname, parts.port)
        self.lines: list[Line] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = url.replace(f"@{parts.hostname}:{parts.port}", f"@127.0.0.1:{self.port}")
        threading.Thread(target=self.accept, args=[self.listener], daemon=True).start()

    def accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = listener.accept()[0]
                try:
                    self.lines.append(Line(client, socket.create_connection(self.target)))
                except OSError:
                    client.close()

    def cut(self) -> int:
        """Close all lines, and return how many of them were open."""
        count = 0
        while self.lines:
            line = self.lines.pop()
            count += line.sockets[0].fileno() >= 0
            line.cut()
        return count

    def mute(self) -> None:
        """Forward no more on the lines there are, without closing them."""
        for line in self.lines:
            line.muted = True

    def refuse(self) -> None:
        """Cut all lines, and refuse new ones."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.cut()

    def listen(self) -> None:
        """Forward again."""
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self.accept, args=[self.listener], daemon=True).start()
