"""File systems that are soon full, files that may not be read."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def without_rights(folder: Path) -> Iterator[None]:
    """Without a superuser's right to open everything; folders that lead to `folder` stay open."""
    if os.geteuid() != 0:
        yield
        return
    for parent in (folder, *folder.parents):
        parent.chmod(parent.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def small_disk_at(disk: Path, size: str) -> Iterator[Path]:
    """A file system of a size, as `mount` reads it, in a new folder; skips the test where none can be mounted."""
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only a superuser who may mount file systems can make a small disk")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # a memory map may still be there
