"""How far a job of a sweep is, from what its process prints: a line when it starts, on the way, and when it ends."""

import re
import subprocess
import time
from datetime import timedelta
from pathlib import Path

_STEP = re.compile(r"step \d+/\d+ .*")
_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_BETWEEN_LINES = 30.0
_TAIL_BYTES = 8192


class JobProgress:
    """Prints lines that begin with the job's label."""

    def __init__(self, label: str, console: Path) -> None:
        """`console` is the file that the job's process prints to."""
        self._label, self._console, self._began = label, console, time.monotonic()

    @property
    def elapsed(self) -> timedelta:
        """Time since the job began, to the second."""
        return timedelta(seconds=round(time.monotonic() - self._began))

    def say(self, text: str) -> None:
        """Print one line about the job."""
        print(f"{self._label}: {text}", flush=True)

    def follow(self, process: subprocess.Popen) -> int:
        """Wait for the process and return its exit code, printing its last line of progress every half minute."""
        shown_at, shown = time.monotonic(), ""
        while (code := process.poll()) is None:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            if time.monotonic() - shown_at >= _SECONDS_BETWEEN_LINES:
                shown_at = time.monotonic()
                if (step := self._last_step()) != shown:
                    shown = step
                    self.say(step)
        return code

    def _last_step(self) -> str:
        steps = [match.group() for line in last_lines(self._console, 50) if (match := _STEP.search(line))]
        return steps[-1] if steps else ""


def last_lines(path: Path, num: int) -> list[str]:
    """Return the last lines of a text file that are not blank, at most `num`; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-num:]
