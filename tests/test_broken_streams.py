"""A stream whose server drops connections, answers 5xx or stalls: tried again, and the rows are the same."""

import threading
import time

import pytest

from jsae_lightning.errors import RunError, UserError
from jsae_lightning.persistence import Patience, tried_once
from jsae_lightning.stream_reader import StreamReader

ROWS = 100


class HTTPFailureError(OSError):
    """An error as the HTTP libraries raise it, with a response that has a status."""

    def __init__(self, status):
        super().__init__(f"status {status}")
        self.response = type("Response", (), {"status_code": status})


class FakeStream:
    """Counts to ROWS; the `faults`, which all its copies share, come one after the other at row `at`."""

    def __init__(self, faults=(), at=45):
        self.faults, self.at, self.next = list(faults), at, 0

    def __deepcopy__(self, memo):
        twin = FakeStream(at=self.at)
        twin.faults, twin.next = self.faults, self.next
        return twin

    def state_dict(self):
        return {"shard_idx": 0, "next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]

    def __iter__(self):
        while self.next < ROWS:
            if self.next == self.at and self.faults:
                self.faults.pop(0)()
            self.next += 1
            yield self.next - 1


def fails(error):
    def fault():
        raise error

    return fault


def stalls():
    time.sleep(3)


def read_all(stream, *, retries=4, timeout_s=60.0):
    waits = []
    reader = StreamReader(stream, Patience(retries, timeout_s, waits.append), "the stream")
    rows = []
    while batch := reader.read(10):
        rows += batch
    return rows, waits


FAULTS = {
    "drop": fails(ConnectionError("reset by peer")),
    "HTTP 503": fails(HTTPFailureError(503)),
    "HTTP 429": fails(HTTPFailureError(429)),
    "short read": fails(EOFError("Compressed file ended before the end-of-stream marker was reached")),
    "stall": stalls,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_stream_that_recovers_gives_every_row_once(fault, caplog):
    timeout = 0.3 if fault == "stall" else 60.0
    rows, waits = read_all(FakeStream([FAULTS[fault]] * 3), timeout_s=timeout)
    assert rows == list(range(ROWS))
    assert waits == [1, 2, 4]
    assert len([r for r in caplog.records if "trying again in" in r.message]) == 3


@pytest.mark.parametrize(
    ("fault", "what"),
    [("drop", "connection broken"), ("HTTP 503", "HTTP 503"), ("stall", "no answer within 0.4 s")],
)
def test_a_stream_that_stays_broken_ends_in_one_line(fault, what):
    with pytest.raises(RunError, match=f"the stream: .*{what}.*, after 3 tries.*is kept.*ckpt_path=auto"):
        read_all(FakeStream([FAULTS[fault]] * 9), retries=2, timeout_s=0.2 if fault == "stall" else 60.0)


@pytest.mark.parametrize("error", [UserError("a mistake"), ValueError("wrong schema"), KeyError("text")])
def test_other_errors_are_not_tried_again(error):
    stream = FakeStream([fails(error)] * 2)
    with pytest.raises(type(error)):
        read_all(stream)
    assert len(stream.faults) == 1


@pytest.mark.parametrize("error", [HTTPFailureError(404), FileNotFoundError("gone")])
def test_a_refusal_is_not_tried_again(error):
    stream = FakeStream([fails(error)] * 2)
    with pytest.raises(RunError, match="no passing failure"):
        read_all(stream)
    assert len(stream.faults) == 1


def test_the_libraries_try_once_and_are_put_back():
    import inspect

    import datasets
    from huggingface_hub import constants
    from huggingface_hub.utils import http_backoff

    def settings():
        retries = inspect.unwrap(http_backoff).__kwdefaults__["max_retries"]
        return datasets.config.STREAMING_READ_MAX_RETRIES, retries, constants.HF_HUB_DOWNLOAD_TIMEOUT

    before = settings()
    with tried_once(7.0):
        assert settings() == (1, 0, 7.0)
    assert settings() == before != (1, 0, 7.0)


def test_an_abandoned_read_does_not_move_the_stream():
    released = threading.Event()
    stream = FakeStream([released.wait])
    reader = StreamReader(stream, Patience(1, 0.2, lambda _: released.set()), "the stream")
    assert reader.read(60) == list(range(60))
    time.sleep(0.1)
    assert reader.read(60) == list(range(60, ROWS))


def test_a_thread_that_has_no_connection_yet_opens_the_stream(monkeypatch):
    """`datasets` keeps a table of connections, one for each thread, in every stream; a copy may add to it."""
    from datasets import IterableDataset
    from huggingface_hub import HfFileSystem

    monkeypatch.setattr(HfFileSystem, "_cache", {})
    connected, done = threading.Event(), threading.Event()

    def connect():
        HfFileSystem(endpoint="http://127.0.0.1:1")
        connected.set()
        done.wait(60)  # while this thread lives no other has its number

    thread = threading.Thread(target=connect)
    thread.start()
    connected.wait(60)
    try:
        stream = IterableDataset.from_generator(lambda: ({"row": n} for n in range(3)))
        assert HfFileSystem._cache in list(vars(stream).values())
        assert StreamReader(stream, Patience(), "the stream").read(5) == [{"row": 0}, {"row": 1}, {"row": 2}]
    finally:
        done.set()
        thread.join()
