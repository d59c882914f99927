"""Text that every machine has: the sources of Python's standard library.

A file belongs to the held-out split by a hash of its name alone, so the language model, the SAEs and every
later run agree on which files nobody trains on, whatever the Python version.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_ONE_IN = 20
_NOT_STANDARD_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}


def stdlib_root() -> Path:
    """Return the folder that holds the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_held_out(name: str) -> bool:
    """Say whether the file called `name` (posix path below the library's root) is never trained on.

    sha256(name) mod 20 == 0: about 5 % of the files.
    """
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def _sources(root: Path) -> Iterator[Path]:
    """Yield the source files below `root`; folders of installed packages, which may hold many more, are not entered."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_STANDARD_LIBRARY]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def stdlib_documents(*, held_out: bool) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each source file of one split, in the order of the names.

    Files that are not UTF-8 (the library tests odd encodings) or are empty are left out, and so are held-out files
    whose content a training file has, too.
    """
    root = stdlib_root()
    names = [path.relative_to(root).as_posix() for path in sorted(_sources(root))]
    twins: dict[int, list[Path]] = {}
    if held_out:
        for name in names:
            if not is_held_out(name):
                twins.setdefault((root / name).stat().st_size, []).append(root / name)
    for name in names:
        if is_held_out(name) != held_out:
            continue
        content = (root / name).read_bytes()
        if any(twin.read_bytes() == content for twin in twins.get(len(content), [])):
            continue
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield name, text
