"""Run `jsae-train` in child processes that start fast: forked from a server that has imported everything once."""

import contextlib
import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
# What has no path there, such as a module of the tests, is left out without a word.
CONTEXT.set_forkserver_preload(["jsae_lightning.building", "datasets", "transformer_lens"])
TIME_LIMIT = 240.0


# 24 steps of 64 tokens, blocks of 5 batches, evaluation every 7 steps, a checkpoint every 4. To draw the heat maps of
# more than one token would take a quarter of the time.
TOY_LENGTHS = [
    "data.train_tokens=1536",
    "data.batch_tokens=64",
    "data.buffer_batches=5",
    "data.val_sequences=4",
    "sae.dead_after_tokens=200",
    "eval.every_n_steps=7",
    "eval.jacobian_tokens=32",
    "callbacks.jacobian_histograms.num_heatmap_tokens=1",
    "checkpoint.every_n_steps=4",
    "checkpoint.every_minutes=null",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "num_threads=1",
]


def toy_overrides(model: Path, text: Path, folder: Path) -> list[str]:
    """A run of seconds: see TOY_LENGTHS."""
    return [
        "experiment=none",
        "model=local",
        f"model.path={model}",
        "model.layer=1",
        "data=text",
        f"data.path={text}",
        "data.document_separator='\\n\\n'",
        "data.context_length=16",
        "data.val_fraction=0.1",
        "sae.expansion_factor=2",
        "sae.k=4",
        *TOY_LENGTHS,
        f"hydra.run.dir={folder}",
    ]


def write_documents(path: Path, documents: int = 400) -> Path:
    """Text of many short, different documents, separated by blank lines."""
    words = ["alpha", "beta", "gamma", "delta", "run", "walk", "red", "blue", "one", "two", "seven", "tree"]
    lines = [" ".join(words[(i * 7 + j * (i % 5 + 1)) % 12] for j in range(12)) + f" {i}." for i in range(documents)]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


def start(
    overrides: list[str], *, output: Path, fault: Callable[[], None] | None = None, **changes: str
) -> multiprocessing.process.BaseProcess:
    """Begin to train in a child process, after `fault()` if given; what it prints is added to a file.

    `changes` are of its environment, for what is read there from now on: everything has been imported already.
    """
    process = CONTEXT.Process(target=_child, args=(overrides, output, fault, changes))
    process.start()
    return process


def train(overrides: list[str], *, output: Path, fault: Callable[[], None] | None = None, **changes: str) -> int:
    """Train as `start` does; return the child's exit code (negative: the signal that ended it)."""
    process = start(overrides, output=output, fault=fault, **changes)
    process.join(TIME_LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"training did not end in {TIME_LIMIT} s: {output.read_text()[-2000:]}")
    assert process.exitcode is not None
    return process.exitcode


def _child(overrides: list[str], output: Path, fault: Callable[[], None] | None, changes: dict[str, str]) -> None:
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["jsae-train", *overrides]
    # Other ranks are started as this process seems to have been: python -m jsae_lightning.train
    sys.modules["__main__"].__spec__ = importlib.util.find_spec("jsae_lightning.train")
    os.environ.update(environment(**changes))
    from jsae_lightning.train import main

    if fault is not None:
        fault()
    main()


def command(overrides: list[str], *torchrun: str) -> list[str]:
    """What runs `jsae-train` as a real process; by torchrun, if arguments of its are given."""
    launcher = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
    return [sys.executable, *launcher, "-m", "jsae_lightning.train", *overrides]


def environment(**changes: str) -> dict[str, str]:
    """The environment for such a process: the package and the tests' own modules can be imported."""
    tests = Path(__file__).parent
    paths = [str(tests.parent), str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | changes


def run(arguments: list[str], *, output: Path, **changes: str) -> int:
    """Run a command to its end, its output added to a file; return its exit code."""
    with output.open("ab") as file:
        done = subprocess.run(
            arguments,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=TIME_LIMIT,
            env=environment(**changes),
            check=False,
        )
    return done.returncode


def processes() -> list[str]:
    """The command lines of all processes of this machine."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended since
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return lines


def wait_for_no_process_in(folder: Path, seconds: float = 60) -> None:
    """Wait until no process has the folder's name in its command line."""
    end = time.monotonic() + seconds
    while left := [line for line in processes() if str(folder) in line]:
        assert time.monotonic() < end, left
        time.sleep(0.2)


def kill_self() -> None:
    """End this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)
