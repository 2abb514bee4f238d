"""Files that are there whole or not at all, on a local disk or on whatever etils.epath opens.

A file is written under a name of its own that ends in .tmp, brought to the disk (fsync), then put in place. A local
writer holds a lock (flock) on its temporary file as long as it lives; so what a killed one left behind is told from
what a live one is writing, also across containers and on NFS. Where locks cannot be had, age decides.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from kdjax.run_log import lock

Place = Any  # pathlib.Path, or the epath.Path of a remote file: the same methods, apart from `stat`

TEMPORARY = ".tmp"
ABANDONED = 24 * 3600  # seconds after which a temporary file without locks is taken for a dead writer's
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


def locate(path: str | os.PathLike[str]) -> Place:
    """The path as an object; a remote one (gs://, s3://, ...) through etils.epath, or ValueError if that cannot."""
    if "://" not in os.fspath(path):
        return Path(path)
    from etils import epath

    try:
        place = epath.Path(path)
        place.exists()
    except (KeyError, NotImplementedError, ImportError) as error:
        raise ValueError(
            f"cache.path must be local or begin with gs://, s3://, az:// or hf://, got {os.fspath(path)!r}; it "
            f"cannot be opened here: {error}. Install what the error names, or set a local path."
        ) from error
    return place


def is_local(place: Place) -> bool:
    """Is it on a disk that can be mapped into memory?"""
    return isinstance(place, Path)


def names_in(directory: Place) -> set[str]:
    """The names of its files; none if there is no such directory."""
    return {place.name for place in directory.iterdir()} if directory.is_dir() else set()


def size_of(file: Place) -> int:
    """Bytes."""
    return os.path.getsize(file) if is_local(file) else file.stat().length


def publish(target: Place, chunks: Sequence[bytes], *, replace: bool = False) -> bool:
    """Write `target` so that nobody ever sees a part of it. False if it was there already and `replace` is off.

    Raises OSError that says what to do if the disk is full or fails; what was written of the file is removed.
    """
    if not replace and target.exists():
        return False
    try:
        return _publish_local(target, chunks, replace) if is_local(target) else _publish_remote(target, chunks, replace)
    except OSError as error:
        raise OSError(_why_unwritten(target, sum(map(len, chunks)), error)) from error


def clean(directory: Place) -> list[str]:
    """Remove the temporary files of writers that are no more; returns their names. Those of live ones stay."""
    leftovers = [name for name in sorted(names_in(directory)) if name.endswith(TEMPORARY)]
    return [name for name in leftovers if _remove_abandoned(directory / name)]


def _publish_local(target: Path, chunks: Sequence[bytes], replace: bool) -> bool:
    temporary, out = _create_locked(target)
    try:
        with out:
            for chunk in chunks:
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
            # The lock is held until the file has its name.
            done = _put(temporary, target, replace)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(target.parent)
    return done


def _create_locked(target: Path) -> tuple[Path, BinaryIO]:
    while True:
        temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}{TEMPORARY}")
        out = open(temporary, "xb")  # noqa: SIM115, the caller closes it
        try:
            lock(out.fileno())
            if temporary.exists():
                return temporary, out
        except BlockingIOError:
            pass
        # A cleaner came between and took it for a dead writer's: another name, then.
        out.close()


def _put(temporary: Path, target: Path, replace: bool) -> bool:
    if not replace:
        try:
            os.link(temporary, target)  # unlike a rename it fails if another writer was faster
            return True
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            if target.exists():
                return False
    os.replace(temporary, target)
    return True


def _sync_directory(directory: Path) -> None:
    # So that the name survives a power cut as well. Not every system lets a directory be opened or synced.
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish_remote(target: Place, chunks: Sequence[bytes], replace: bool) -> bool:
    temporary = target.parent / f"{target.name}.{uuid.uuid4().hex}{TEMPORARY}"
    try:
        with temporary.open("wb") as out:
            for chunk in chunks:
                out.write(chunk)
        if not replace and target.exists():
            return False
        temporary.replace(target)
    finally:
        if temporary.exists():
            temporary.unlink()
    return True


def _remove_abandoned(file: Place) -> bool:
    try:
        if not is_local(file):
            return _remove_old(file, file.stat().mtime)
        with open(file, "r+b") as held:
            if lock(held.fileno()):
                file.unlink()
                return True
            return _remove_old(file, os.path.getmtime(file))
    except BlockingIOError:  # its writer lives
        return False
    except FileNotFoundError:  # it was just put in place, or another cleaner was faster
        return False
    except PermissionError:  # another user's
        return False


def _remove_old(file: Place, written: float) -> bool:
    old = 0 < written < time.time() - ABANDONED  # 0: the storage does not know
    if old:
        file.unlink()
    return old


def _why_unwritten(target: Place, needed: int, error: OSError) -> str:
    what = f"{target} could not be written"
    then = "Shards that are finished stand; run the same command again, it goes on where it stopped"
    if error.errno not in FULL:
        return f"{what}: {error}. {then} when that is repaired."
    free = ""
    if is_local(target):
        free = f", {shutil.disk_usage(target.parent).free / 1e6:.1f} MB are free on its disk"
    return f"{what}: {error.strerror}. It needs {needed / 1e6:.1f} MB{free}. {then} once there is room."
