"""Files that are either whole or not there."""

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
        path: The file to write; its folder must exist. Of a symbolic link the file that it leads to
            is written, and the link stays.
        backup: Keep the present file under this name, which must be in the folder of that file.

    Yields:
        The temporary path to write to.

    Raises:
        OSError: If the file cannot be written; names ``path``, which is then as it was.
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
        # A full disk names no file, and mkstemp one that nobody knows.
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
    """Remove what writers that were killed left behind; call it when no other can be at work.

    Args:
        folder: Where to look; its folders are others' to clean.
        name: Only the files that were to become ``name`` or go on from there.
    """
    for left in folder.glob(f".{name}*{_UNFINISHED}"):
        left.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Let the new name survive a power cut too."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
