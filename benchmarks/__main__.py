"""Measures everything again, and writes the tables and pictures of README and documentation.

    python -m benchmarks                     # all parts, hours; a part that is interrupted goes on with the next call
    python -m benchmarks pareto tables       # some of them
    python -m benchmarks --fresh             # also what an earlier call has finished
    python -m benchmarks --quick             # a rehearsal in minutes: small models, results in a temporary folder

What has been finished is noted in `outputs/benchmarks.txt`, one command a line; the file goes when all is done. A
command that fails does not keep the others from running; the exit status tells.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import rehearsal
from benchmarks.parts import PARTS

FINISHED = Path("outputs") / "benchmarks.txt"


def run(command: str) -> bool:
    """Runs a command in a process of its own; whether it came to its end."""
    return subprocess.run([sys.executable, "-m", *shlex.split(f"benchmarks.{command}")], check=False).returncode == 0


def rehearse(command: str) -> bool:
    """Runs a command in this process, which has everything imported."""
    module, *arguments = shlex.split(command)
    file = f"benchmarks.{module}.__main__" if module == "integrations" else f"benchmarks.{module}"
    sys.argv = [module, *arguments]
    try:
        importlib.import_module(file).main()
    except SystemExit as end:
        return not end.code
    except Exception:
        traceback.print_exc()
        return False
    return True


def is_empty(table: str) -> bool:
    """Whether a table of the documentation has no rows; after a rehearsal, of what that has measured."""
    from benchmarks.markdown import EMPTY
    from benchmarks.tables import TABLES

    return EMPTY in TABLES[table]()


def run_all(commands: Sequence[str], run: Callable[[str], bool], finished: Path | None = None) -> list[str]:
    """Runs the commands that the file `finished` does not list, noting there those that end well; gives the others."""
    done = set(finished.read_text().splitlines()) if finished and finished.exists() else set()
    failed = []
    for number, command in enumerate(commands, start=1):
        about = f"[{number}/{len(commands)}] {command}"
        if command in done:
            print(f"{about}: finished before", file=sys.stderr)
            continue
        print(about, file=sys.stderr)
        start = time.monotonic()
        well = run(command)
        print(f"{about}: {'done' if well else 'FAILED'}, {time.monotonic() - start:.0f} s", file=sys.stderr)
        if not well:
            failed.append(command)
        elif finished:
            finished.parent.mkdir(exist_ok=True)
            with finished.open("a") as file:
                file.write(command + "\n")
    return failed


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="a rehearsal, which leaves the results alone")
    parser.add_argument("--fresh", action="store_true", help="repeat what has been finished")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    parts = [PARTS[name] for name in options.parts or PARTS]
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            rehearsal.begin(Path(folder))
            failed = run_all([command for part in parts for command in part.quick], rehearse)
            failed += [f"table {name}, which is empty" for part in parts for name in part.tables if is_empty(name)]
    else:
        if options.fresh:
            FINISHED.unlink(missing_ok=True)
        failed = run_all([command for part in parts for command in part.commands], run, FINISHED)
        if not failed and not options.parts:
            FINISHED.unlink(missing_ok=True)
    sys.exit("\n".join(f"failed: {command}" for command in failed) or 0)


if __name__ == "__main__":
    main()
