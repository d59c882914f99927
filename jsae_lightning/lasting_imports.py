"""Import large packages faster: they make a million objects that stay, which the garbage collector need not look at."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Collect no garbage in the block, and never look at what exists at its end again, nor when the process ends.

    Without this, a third of the processor time of importing lightning and the rest, and of ending, goes into it.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
