"""No rank waits for one that is gone.

A rank that dies leaves the others in a collective operation: with gloo they get an error, with nccl they wait for
minutes, and while they make activations they notice nothing. So every rank holds an open connection to rank 0, which
the operating system closes with the process that held it, whatever ended that process.
"""

import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from jsae_lightning.launch import command_to_go_on

_END, _ERROR, _LOST = b"E", b"X", b"L"
_CONNECT_TIMEOUT_S = 60.0
_GRACE_S = 10.0
"""Seconds that a rank has to end by itself after another one has ended with an error of its own."""
_SECONDS_TO_LEARN = 2.0
"""Seconds after an error that a rank waits for news of another's death, which would be its cause."""
_KEEPALIVE_S = 10
"""Seconds of silence, and between probes, after which a peer's whole machine is looked for; four probes."""


class RankWatch(Callback):
    """Ends this process with exit code 1 and one line when another rank is gone; does nothing with one rank.

    A machine that vanishes without closing its connections is noticed within 50 seconds, a process at once. The ranks
    meet when the data and the language model are loaded; before that it is the launcher (Lightning's, torchrun, srun)
    that ends them.
    """

    def __init__(self, on_lost: Callable[[str], None], folder: str) -> None:
        """`on_lost` is called with the message before the process ends; `folder` is named in it."""
        self._on_lost, self._folder = on_lost, folder
        self._peers: dict[int, socket.socket] = {}
        self._is_done = False
        self._said_error = threading.Event()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Connect the ranks: a collective operation."""
        if trainer.world_size == 1:
            return
        # Loading may take one rank minutes longer; not every backend's broadcast waits for those that receive.
        trainer.strategy.barrier()
        if trainer.global_rank == 0:
            with _listen() as listener:
                port, token = trainer.strategy.broadcast((listener.getsockname()[1], os.urandom(16)))
                self._peers = _accept(listener, trainer.world_size - 1, token)
        else:
            port, token = trainer.strategy.broadcast((0, b""))
            self._peers = {0: _connect(port, token, rank=trainer.global_rank)}
        threading.Thread(target=self._watch, daemon=True, name="rank-watch").start()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the others that this rank ends as it should."""
        self._is_done = True
        self._say(_END)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell the others that this rank ends with an error; if it comes of a lost rank, let the watch name that."""
        if self._peers and isinstance(exception, RuntimeError):
            time.sleep(_SECONDS_TO_LEARN)  # a broken collective is an error of this kind; the watch ends the process
        self._said_error.set()
        self._say(_ERROR)

    def _say(self, word: bytes) -> None:
        for peer in self._peers.values():
            with suppress(OSError):
                peer.sendall(word)

    def _watch(self) -> None:
        open_peers = {peer: rank for rank, peer in self._peers.items()}
        while open_peers:
            for peer in select.select(list(open_peers), [], [])[0]:
                rank = open_peers[peer]
                try:
                    said = peer.recv(64)
                except OSError:
                    said = b""
                if said.startswith(_LOST):
                    self._end(int(said[1:5].decode()))
                if not said:
                    self._end(rank)
                if said.startswith(_ERROR):
                    time.sleep(_GRACE_S)  # the error is often everybody's, and each rank has its own exit code
                    self._end(rank)
                del open_peers[peer]

    def _end(self, rank: int) -> None:
        if self._is_done:  # what is left to do needs no other rank
            return
        if self._said_error.is_set():  # this rank ends already, with its own exit code
            time.sleep(_GRACE_S)
        for peer in self._peers.values():
            with suppress(OSError):
                peer.sendall(_LOST + f"{rank:04d}".encode())
        message = (
            f"rank {rank} is gone (killed, out of memory, or an error of its own above): ending the others; the last "
            f"checkpoint is kept, go on with: {command_to_go_on(self._folder)}"
        )
        with suppress(Exception):
            self._on_lost(message)
        print(f"jsae-train: error: {message}", file=sys.stderr, flush=True)
        os._exit(1)


def _host() -> str:
    return os.environ.get("MASTER_ADDR", "127.0.0.1")


def _listen() -> socket.socket:
    """Listen where the ranks are known to reach rank 0, on any free port."""
    try:
        return socket.create_server((_host(), 0))
    except OSError:  # an address that belongs to a router in front of this machine
        return socket.create_server(("", 0))


def _accept(listener: socket.socket, count: int, token: bytes) -> dict[int, socket.socket]:
    listener.settimeout(_CONNECT_TIMEOUT_S)
    peers: dict[int, socket.socket] = {}
    while len(peers) < count:
        peer, _ = listener.accept()
        peer.settimeout(_GRACE_S)
        try:
            said = _receive(peer, 20)
        except OSError:
            said = b""
        if said[:16] != token:  # somebody else's connection
            peer.close()
            continue
        _keep_alive(peer)
        peers[int.from_bytes(said[16:], "big")] = peer
    return peers


def _connect(port: int, token: bytes, *, rank: int) -> socket.socket:
    peer = socket.create_connection((_host(), port), timeout=_CONNECT_TIMEOUT_S)
    peer.sendall(token + rank.to_bytes(4, "big"))
    _keep_alive(peer)
    return peer


def _receive(peer: socket.socket, size: int) -> bytes:
    said = b""
    while len(said) < size and (part := peer.recv(size - len(said))):
        said += part
    return said


def _keep_alive(peer: socket.socket) -> None:
    peer.settimeout(None)
    options: dict[Any, int] = {"TCP_KEEPIDLE": _KEEPALIVE_S, "TCP_KEEPINTVL": _KEEPALIVE_S, "TCP_KEEPCNT": 4}
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in options.items():
        if hasattr(socket, name):  # macOS lacks the first
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
