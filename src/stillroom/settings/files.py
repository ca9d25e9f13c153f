"""Writing so that a kill or a full disk leaves either the old file or the new one, never half of one."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from stillroom.settings.errors import Refusal


def sync(path: Path) -> None:
    """To the disk: a file's bytes, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_folder(folder: Path) -> None:
    """That results can go there, asked before the work that they come of. Nothing is made yet."""
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not there.is_dir():
        raise Refusal(f"{there} is a file, and no folder; give another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise Refusal(f"{there} cannot be written in; give another place")


def require_file(file: Path | None) -> None:
    """The same of a file, where one is given."""
    if file is not None and file.is_dir():
        raise Refusal(f"{file} is a folder; give a file")
    if file is not None:
        require_folder(file.parent)


def write_atomically(path: Path, content: str | bytes, writer: int | None = None) -> None:
    with file_written_atomically(path, writer) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def file_written_atomically(path: Path, writer: int | None = None) -> Iterator[Path]:
    """A temporary file to write; it gets its own name only when it is on the disk.

    Where several processes may write `path` at once, each gives its number as `writer`, for a temporary file of its
    own. What a killed one leaves of that is not written over by the next, as it is without.
    """
    new = path.with_name(f".{path.name}.new" if writer is None else f".{path.name}.{writer}.new")
    try:
        yield new
        sync(new)
        new.replace(path)
        sync(path.parent)
    except BaseException as error:
        with suppress(OSError):     # whatever else lies there, the first error is the one to tell
            new.unlink()
        if _is_disk(error):
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)
            raise Refusal(f"{path} could not be written: {reason_of(error)}; {'free some space, or ' * full}give "
                          "another place") from error
        raise


def locked(path: Path, busy: str) -> IO[str]:
    """The open file, held by one process at a time: let go of when it is closed, however the process ends."""
    try:
        file = path.open("w")
    except OSError as error:
        raise Refusal(f"{path} could not be written: {error.strerror}; give another place") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise Refusal(busy) from None
    except OSError as error:        # of some network file systems
        file.close()
        raise Refusal(f"{path} cannot be locked: {error.strerror}; give a place on a disk with locks") from error
    return file


@contextmanager
def held(path: Path, busy: str) -> Iterator[None]:
    """By one process at a time: what is written by renaming, and has this file beside it meanwhile."""
    with locked(path, busy):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def folder_written_atomically(path: Path) -> Iterator[Path]:
    """A folder to fill under a temporary name; it gets its own name only when everything in it is on the disk."""
    new = path.with_name(f".{path.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        yield new
        for file in new.rglob("*"):
            sync(file)
        sync(new)
        if path.exists():  # a rename cannot replace a folder that is not empty
            old = path.with_name(f".{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            try:
                path.rename(old)
                new.rename(path)
            finally:
                if not path.exists():
                    old.rename(path)
            shutil.rmtree(old)
        else:
            new.rename(path)
        sync(path.parent)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if _is_disk(error):
            raise Refusal(f"{path} could not be written: {reason_of(error)}; what was there before is "
                          "untouched") from error
        raise


@contextmanager
def new_folder(folder: Path | str) -> Iterator[Path]:
    """A folder to fill, where there is none yet or an empty one."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refusal(f"{folder} exists already; choose a new folder")
    with folder_written_atomically(folder) as new:
        yield new


def _is_disk(error: BaseException) -> bool:
    # safetensors reports a full disk as its own error, with the system's words in the text
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


def reason_of(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Refusal(f"{path}: not readable: {error}") from None
