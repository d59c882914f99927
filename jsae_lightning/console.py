"""What programs say while they work, and whether anybody still reads it."""

import logging
import os
import select
import sys
from collections.abc import Sequence


def log_to_stdout(level: int) -> None:
    """Show what a program that evaluates has to say."""
    logging.basicConfig(level=level, format="[%(asctime)s][%(levelname)s] %(message)s", stream=sys.stdout)
    logging.getLogger("jsae_lightning.data").setLevel(logging.WARNING)  # it speaks of training


def show(texts: Sequence[str]) -> None:
    """Print texts, with escapes for what the terminal's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    for text in texts:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def nobody_reads() -> bool:
    """Return whether the reader of stdout is gone (`| head`); what is still to be printed is dropped then."""
    try:
        stdout = sys.stdout.fileno()
    except (OSError, ValueError):  # no file at all, or closed
        return False
    poll = select.poll()
    poll.register(stdout, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True
