"""One run a folder: whoever trains in it holds a lock, and a second one is told who that is.

The lock is the kernel's (flock on `RUN/.lock`): it is free as soon as its process is gone, however that
ended. Where somebody deletes a run's folder and starts another run of that name, the first one notices and
stops. On a network disk the lock holds as far as the disk's server carries it to other machines; where there
are no locks at all, a warning says so and the run goes on. Who only reads a run needs none.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from act24.errors import Act24Error
from act24.tools.checkpoints.together import on_every_rank, on_the_first
from act24.tools.files import is_plain

LOCK = ".lock"
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)

logger = logging.getLogger("act24")


class RunError(Act24Error):
    """A run's folder that cannot be used as asked."""


@dataclass(frozen=True)
class Lock:
    """A held folder. Open descriptors of both keep their inodes from being given to others.

    Attributes:
        run_dir: the folder's name.
        folder: its descriptor.
        file: that of the locked file.
    """

    run_dir: Path
    folder: int
    file: int

    def holds(self) -> bool:
        """Whether the folder of that name is still this one, and nobody else's lock is in it."""
        try:
            if not os.path.samestat(os.stat(self.run_dir), os.fstat(self.folder)):
                return False
            path = self.run_dir / LOCK  # gone alone, as on disks that are swept of old files, it does no harm
            return not os.path.lexists(path) or os.path.samestat(os.lstat(path), os.fstat(self.file))
        except OSError:
            return False

    def check(self) -> None:
        """Raises RunError unless `holds`."""
        if not self.holds():
            raise RunError(
                f"{self.run_dir} was deleted, moved or taken by another run while this one wrote there: "
                "it stops, and writes nothing more"
            )


def check_together(lock: Lock | None) -> None:
    """`Lock.check` by the process that holds one, for all. Collective. Raises RunError or Act24Error."""
    on_every_rank(lambda: lock.check() if lock else None)


@contextmanager
def run_lock(run_dir: Path, option: str = "--run-dir") -> Iterator[Lock]:
    """Hold the folder of a run, or what else writes one, which is made if it is missing, and gone again if
    nothing was written in it. `option` is that which names another folder.

    Raises:
        RunError: another process holds it, it cannot be written, or its `.lock` is not of this program.
    """
    made = [folder for folder in (run_dir, *run_dir.parents) if not os.path.lexists(folder)]
    path = run_dir / LOCK
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path, option)
        lock = Lock(run_dir, os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY), descriptor)
    except OSError as error:
        raise RunError(f"cannot write the folder {run_dir}: {error}; choose another with {option}") from None
    try:
        yield lock
    finally:
        if made and lock.holds() and os.listdir(run_dir) == [LOCK]:
            path.unlink()  # before it is free: who opened it meanwhile sees that it is gone
            for folder in made:
                if os.listdir(folder):
                    break
                folder.rmdir()
        os.close(lock.folder)
        os.close(descriptor)


def _foreign(path: Path, option: str) -> str:
    return (
        f"{path} is not of act24, which writes a lock of that name: move it away, or choose another folder "
        f"with {option}"
    )


@contextmanager
def lock_on_the_first(run_dir: Path) -> Iterator[Lock | None]:
    """`run_lock` by the first process of a run, for all; the others have None.

    Raises:
        RunError: as there; on the other processes another Act24Error that says the same.
    """
    with ExitStack() as stack:
        held: list[Lock] = []
        on_the_first(lambda: held.append(stack.enter_context(run_lock(run_dir))))
        yield held[0] if held else None


def _locked(path: Path, option: str) -> int:
    while True:
        if os.path.lexists(path) and not is_plain(path):
            raise RunError(_foreign(path, option))
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
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
                f"choose another folder with {option}"
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
        if not b"process ".startswith(os.pread(descriptor, 8, 0)):  # a full disk may have cut it off
            os.close(descriptor)
            raise RunError(_foreign(path, option))
        os.ftruncate(descriptor, 0)
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode(), 0)
        return descriptor
