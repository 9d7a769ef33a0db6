"""The examples' cache: folders that are built once, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_dir(override: str | os.PathLike[str] | None = None) -> Path:
    """`override`, else `$PEFT_S2A_CACHE`, else `$XDG_CACHE_HOME/peft_s2a`, else `~/.cache/peft_s2a`."""
    if override is not None:
        return Path(override).expanduser()
    if own := os.environ.get("PEFT_S2A_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser() / "peft_s2a"


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, calling `build(empty_folder)` first when it does not exist.

    `build` fills a temporary folder beside `folder`, which is renamed when it has finished: an interrupted or failed
    build leaves nothing behind, and of two processes that build at once the first one wins.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        build(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
