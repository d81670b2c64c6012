"""Where decoded data are kept, one process at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from l2l_prune._basics.files import remove_unfinished


def cache_folder(root: str | os.PathLike[str] | None = None) -> Path:
    """``root``, else ``L2L_PRUNE_CACHE``, else the user's cache folder; made if missing.

    Raises:
        OSError: If it cannot be made.
    """
    import platformdirs

    chosen = root or os.environ.get("L2L_PRUNE_CACHE") or platformdirs.user_cache_dir("l2l_prune")
    folder = Path(chosen)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold ``<path>.lock``, so that two processes do not make the same file."""
    import filelock

    with filelock.FileLock(f"{path}.lock"):
        remove_unfinished(path.parent, path.name)
        yield
