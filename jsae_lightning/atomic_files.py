"""Files that are either whole or not there: write to a temporary name in the same folder, flush to disk, rename."""

import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jsae_lightning.errors import UserError
from jsae_lightning.processes import is_alive


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on any error it is removed.

    Raises UserError when the disk is full or the folder cannot be written; what stood at `path` before is still there.
    """
    with _clear_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
        try:
            yield temporary
            _flush(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the place of `path` and of all that it held.

    Of a link to a folder it is the folder that is replaced.
    """
    path = path.resolve()
    with _clear_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{_own_prefix(path)}{os.getpid()}.", suffix=".tmp", dir=path.parent))
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            temporary.chmod(0o755)
            if path.exists():
                old = temporary.with_suffix(".old")
                path.replace(old)
                temporary.replace(path)
                shutil.rmtree(old)
            else:
                temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_stale_folders(path: Path) -> None:
    """Remove the temporary folders of `atomic_folder(path)` whose process, one of this machine, lives no more.

    Those of other machines, of which that cannot be known, and those that are being written stay.
    """
    path = path.resolve()
    if not path.parent.is_dir():
        return
    prefix = _own_prefix(path)
    for folder in path.parent.iterdir():
        pid = folder.name.removeprefix(prefix).split(".")[0]
        is_temporary = folder.name.startswith(prefix) and folder.suffix == ".tmp" and pid.isdigit()
        if is_temporary and not is_alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _own_prefix(path: Path) -> str:
    return f".{path.name}.{socket.gethostname()}."


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove the temporary files and folders that a killed process left in `folder`, of all or of one final name.

    To be used where no other process writes to what is named so.
    """
    for path in [*folder.glob(f".{name}.*tmp"), *folder.glob(f".{name}.*old")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _flush(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{path}: the disk is full while writing it: free some space; what was there before is kept"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise UserError(f"{path}: cannot be written ({error.strerror}): choose another folder") from error
        raise
    except RuntimeError as error:  # torch's writers report a full disk so
        if "No space left" in str(error) or "file write failed" in str(error) or "unexpected pos" in str(error):
            raise UserError(
                f"{path}: the disk is full while writing it: free some space; what was there before is kept"
            ) from error
        raise
