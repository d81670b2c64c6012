"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_UNFINISHED = ".l2l_prune-tmp"


@contextmanager
def replace_file(path: Path, backup: Path | None = None) -> Iterator[Path]:
    """Write a file through a temporary one beside it, which replaces it only when complete.

    Args:
        path: The file to write; its folder must exist. If it is a symbolic link, the link stays
            and its target is written.
        backup: Keep the present file under this name, which must be in the folder of that file.

    Yields:
        The temporary path to write to.

    Raises:
        OSError: If the file cannot be written. The error names ``path``, which is unchanged then.
    """
    asked, path = path, linked_file(path)
    temporary = path
    try:
        handle, name = tempfile.mkstemp(_UNFINISHED, f".{path.name}.", path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp's files are private
        if backup is not None and path.exists():
            os.replace(path, backup)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        # On a full disk the error names no file, or mkstemp's, which no user knows.
        ours = error.filename is None or str(error.filename).endswith(_UNFINISHED)
        if error.errno is None or not ours:
            raise
        raise OSError(error.errno, error.strerror, str(asked)) from error
    finally:
        if temporary != path:
            temporary.unlink(missing_ok=True)


def linked_file(path: Path) -> Path:
    """The file that a symbolic link leads to, or ``path`` itself."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def remove_unfinished(folder: Path, name: str = "") -> None:
    """Remove what killed writers left behind; call it only when no writer can be at work.

    Args:
        folder: Where to look; its subfolders are not searched.
        name: Only files that were to become ``name``, or a name that begins so.
    """
    for left in folder.glob(f".{name}*{_UNFINISHED}"):
        left.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut too."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
