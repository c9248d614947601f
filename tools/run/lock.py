"""One run a folder: whoever trains in it holds a lock, and a second one is told who that is.

The lock is the kernel's (flock on `RUN/.lock`): it is free as soon as its process is gone, however that
ended. On a network disk it holds as far as the disk's server carries it to other machines; where there are no
locks at all, a warning says so and the run goes on. Who only reads a run needs none.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from act24.errors import Act24Error
from act24.tools.checkpoints.together import on_the_first

LOCK = ".lock"
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)

logger = logging.getLogger("act24")


class RunError(Act24Error):
    """A run's folder that cannot be used as asked."""


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the folder of a run, which is made if it is missing, and gone again if nothing was written in it.

    Raises:
        RunError: another process holds it, or it cannot be written.
    """
    made = [folder for folder in (run_dir, *run_dir.parents) if not os.path.lexists(folder)]
    path = run_dir / LOCK
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path)
    except OSError as error:
        raise RunError(f"cannot write the run's folder {run_dir}: {error}") from None
    try:
        yield
    finally:
        if made and os.listdir(run_dir) == [LOCK]:
            path.unlink()  # before it is free: who opened it meanwhile sees that it is gone
            for folder in made:
                if os.listdir(folder):
                    break
                folder.rmdir()
        os.close(descriptor)


@contextmanager
def lock_on_the_first(run_dir: Path) -> Iterator[None]:
    """`run_lock` by the first process of a run, for all.

    Raises:
        RunError: as there; on the other processes another Act24Error that says the same.
    """
    with ExitStack() as stack:
        on_the_first(lambda: stack.enter_context(run_lock(run_dir)))
        yield


def _locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink == 0:  # its last holder deleted it between the two lines above
                os.close(descriptor)
                continue
        except (BlockingIOError, PermissionError):
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise RunError(
                f"{path.parent} is in use{' by ' + holder if holder else ''}: wait for that run to end, or "
                "choose another folder with --run-dir"
            ) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(descriptor)
                raise
            logger.warning(
                "%s: this disk has no locks (%s), so nothing keeps a second run out",
                path.parent,
                error.strerror,
            )
        os.ftruncate(descriptor, 0)
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode(), 0)
        return descriptor
