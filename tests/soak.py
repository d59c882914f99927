"""Start, SIGKILL and resume one tiny run again and again; then compare it with a run that was left alone.

    python tests/soak.py [--cycles 100] [--folder DIR] [--seed 0]

Every cycle kills the run at a random moment: while it starts, trains, evaluates or saves. Ends with exit code 1 and
says why if the final checkpoint, the logs or the TensorBoard scalars differ in a bit, or if a process, a file or a lock
is left over.
"""

import argparse
import collections
import contextlib
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import psutil

from comparing import assert_same_run
from jsae_lightning.run_status import is_locked, read_status
from running import start, toy_overrides, train, write_documents
from tiny_models import make_model_dir

STEPS = 1000
SETTINGS = [
    f"data.train_tokens={64 * STEPS}",
    "eval.every_n_steps=30",
    "eval.jacobian_tokens=32",
    "checkpoint.every_n_steps=5",
]


def main() -> None:
    """Parse the arguments, soak, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=100, help="how often the run is killed")
    parser.add_argument("--folder", type=Path, help="where everything is written (default: a temporary folder)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which the run is killed")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="jsae_soak_"))
    folder.mkdir(parents=True, exist_ok=True)
    soak(folder, arguments.cycles, random.Random(arguments.seed))
    if arguments.folder is None:
        shutil.rmtree(folder)


def soak(folder: Path, cycles: int, chance: random.Random) -> None:
    """Run everything below `folder`."""
    began = time.monotonic()
    material = make_model_dir("gpt_neox", folder / "model"), write_documents(folder / "text.txt")
    alone, soaked, output = folder / "alone", folder / "soaked", folder / "output"
    assert train([*toy_overrides(*material, alone), *SETTINGS], output=output) == 0, output.read_text()
    print(f"left alone: {STEPS} steps in {time.monotonic() - began:.0f} s", flush=True)
    resume = ["ckpt_path=auto", f"hydra.run.dir={soaked}"]
    moments: collections.Counter[str] = collections.Counter()
    for cycle in range(cycles):
        first = not (soaked / "arguments.json").exists()
        moments[
            kill_once([*toy_overrides(*material, soaked), *SETTINGS] if first else resume, soaked, output, chance)
        ] += 1
        check_nothing_left(soaked)
        if (cycle + 1) % 10 == 0:
            print(f"{cycle + 1} kills, {time.monotonic() - began:.0f} s: {dict(moments)}", flush=True)
    assert train(resume, output=output) == 0, output.read_text()[-3000:]
    assert_same_run(soaked, alone)
    check_nothing_left(soaked)
    status = read_status(soaked)
    assert status is not None and status.status == "finished"
    print(
        f"{cycles} kills ({dict(moments)}), {len(status.attempts)} attempts recorded, "
        f"{time.monotonic() - began:.0f} s: checkpoint, logs and TensorBoard scalars equal those of the run that was "
        "left alone; nothing left over"
    )


def kill_once(overrides: list[str], run: Path, output: Path, chance: random.Random) -> str:
    """Start the run, kill it at a random moment, and say what it was doing."""
    process = start(overrides, output=output)
    deadline = time.monotonic() + 120
    if chance.random() < 0.2:  # in the middle of starting
        time.sleep(chance.uniform(0, 1.5))
        moment = "starting"
    else:
        before = _mark(run)
        while _mark(run) == before and process.is_alive():
            assert time.monotonic() < deadline, output.read_text()[-3000:]
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))
        moment = "saving" if list((run / "checkpoints").glob(".*.tmp")) else "training"
    if not process.is_alive():
        raise AssertionError(f"ended before it was killed, with code {process.exitcode}: {output.read_text()[-3000:]}")
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return moment


def _mark(run: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    return 0


def _is_of_multiprocessing(child: psutil.Process) -> bool:
    """Whether it is the server that forks the runs, or the tracker beside it: the only ones that may stay."""
    return child.parent() == psutil.Process() and "multiprocessing" in " ".join(child.cmdline())


def check_nothing_left(run: Path) -> None:
    """Fail if a process of a run lives, if its folder is locked, or if temporary files pile up."""
    left = [child for child in psutil.Process().children(recursive=True) if not _is_of_multiprocessing(child)]
    assert not left, f"left running: {left}"
    assert not run.exists() or not is_locked(run), "the folder is still locked"
    names = {path.name for path in run.rglob("*")} if run.exists() else set()
    assert len([name for name in names if name.endswith((".tmp", ".old"))]) <= 2, f"pile up: {names}"


if __name__ == "__main__":
    main()
