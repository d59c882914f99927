"""Where the time of `jsae-train` goes: the language model, the step, and what is neither.

The training is a real one, in a process of its own, with a callback (`loop_times`) that notes when the language model
runs and when a step does. From these intervals, on one clock:

    wall            from the fetching of the first batch to the end, without `paused`: evaluation, figures, saves
    language model  its forward passes that fill the activation buffer
    step            forward, backward, optimizer, with clipping and the projection and norm of the decoders
    lost            wall - time in which the language model or a step ran, be it at the same time
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsae_lightning.benchmarking.tables import figure
from jsae_lightning.errors import RunError, UserError
from jsae_lightning.result_files import markdown_table

CALLBACK = "jsae_lightning.benchmarking.loop_times.LoopTimes"
_OWN = ("hydra.run.dir", "trainer.max_steps", "ckpt_path", "hydra.mode")
_ROWS = {
    "language_model": "language model (block filling)",
    "forward": "step: forward",
    "backward": "step: backward",
    "optimizer": "step: optimizer",
    "overlap": "of these, at the same time",
    "lost_between": "lost: from batch to batch (shuffling, copying, Lightning)",
    "lost_around": "lost: around the step (callbacks, logging, Lightning)",
}


def measure_loop(overrides: Sequence[str], *, steps: int) -> dict[str, Any]:
    """Train for `steps` optimizer steps with the overrides of `jsae-train`; return what `LoopTimes` wrote.

    What the training prints goes to stderr. Raises UserError for overrides that are set here, RunError if training
    fails.
    """
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        if key in _OWN:
            raise UserError(f"{key}: is set by --train itself: leave it out (steps: --steps N)")
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "loop.json"
        own = [
            f"trainer.max_steps={steps}",
            f"+callbacks.loop_times._target_={CALLBACK}",
            f"+callbacks.loop_times.path='{found}'",
            f"hydra.run.dir='{folder}/run'",
        ]
        command = [sys.executable, "-m", "jsae_lightning.train", *overrides, *own]
        code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
        if code == 2:
            raise UserError("--train: jsae-train refused its settings, see the line above: correct them")
        if code != 0 or not found.is_file():
            raise RunError(f"--train: jsae-train failed with exit code {code}, see above")
        record = json.loads(found.read_text(encoding="utf-8"))
    return record | {"overrides": list(overrides)}


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """Return each part's share of the wall-clock time."""
    wall = seconds["wall"]
    return {name: value / wall for name, value in seconds.items() if name not in ("wall", "paused")}


def loop_table(record: dict[str, Any]) -> list[str]:
    """Return the lines that say where the time went."""
    seconds, share = record["seconds"], shares(record["seconds"])
    rows = [[label, figure(seconds[name], ".3f"), f"{share[name]:.1%}"] for name, label in _ROWS.items()]
    rows += [
        ["step in all", figure(seconds["step"], ".3f"), f"{share['step']:.1%}"],
        ["lost outside language model and step", figure(seconds["lost"], ".3f"), f"{share['lost']:.1%}"],
        ["all", figure(seconds["wall"], ".3f"), "100.0%"],
    ]
    notes = [
        f"{record['steps']} steps of {record['batch_tokens']:,} tokens, {record['tokens_per_second']:,.0f} tokens/s; "
        f"{seconds['paused']:.1f} s of evaluation, figures and saves left out"
    ]
    if record["steps"] % record["buffer_batches"]:
        notes.append(
            f"the last block of {record['buffer_batches']} batches was made and not used up: its language model's "
            "time is in the table (choose --steps as a multiple of it)"
        )
    return [
        " ".join(["jsae-train", *record["overrides"]]),
        "",
        markdown_table(["", "s", "share"], rows, [False, True, True]),
        "",
        *notes,
    ]
