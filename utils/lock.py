"""One process at a time in a folder, on one machine or several that share it."""
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK = ".lock"
# What file systems say that keep no locks (some NFS and FUSE mounts).
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def only_one(folder: Path, what: str, mend: str, elsewhere: str) -> Iterator[None]:
    """ValueError that names host and process of whoever is inside already; mend, elsewhere: what to do then, and where
    the folder cannot be written.

    The lock belongs to the open file: the kernel lets go of it when the process ends, however it ends. Linux keeps such
    locks on NFS for all machines; where a file system keeps none, a warning says so.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(folder / LOCK, what, mend)
    except OSError as error:
        raise ValueError(f"cannot write to the folder {folder} ({error.strerror}): {elsewhere}") from error
    try:
        yield
    finally:
        if file is not None:
            (folder / LOCK).unlink(missing_ok=True)  # while it is still ours
            os.close(file)


def _locked(path: Path, what: str, mend: str) -> int | None:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(file, 200).decode(errors="replace").strip()
            os.close(file)
            if error.errno in NO_LOCKS:
                logger.warning("%s: this file system keeps no locks, so that nothing stops a second process (%s)",
                               path.parent, error.strerror)
                return None
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise ValueError(f"{what} is in use by {holder or 'another process'}: {mend}") from None
        if _still_there(file, path):  # the one before may have removed it between our opening and our locking
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return file
        os.close(file)


def _still_there(file: int, path: Path) -> bool:
    try:
        return os.fstat(file).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
