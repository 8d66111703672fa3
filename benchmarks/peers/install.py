"""Make the venvs and the models that the peers need, once.

    python -m benchmarks.peers.install --dir .peers [--only llama_cpp,openvino]

Run with StrataKV's own Python. A venv that cannot be made is no error: why is written to `failed.txt` beside it, which
the driver reports, and the next call tries again. The whole output is in `install.log` beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.peers.catalog import ENVIRONMENTS, Environment

STAMP = "installed.json"
FAILURE = "failed.txt"


def install(environment: Environment, peers_dir: Path) -> str | None:
    """Make one venv, unless it is there as the catalog wants it. Returns why that failed, or None."""
    folder = peers_dir / environment.name
    recipe = json.dumps([*environment.installs, environment.code])
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == recipe:
        return None
    stamp.unlink(missing_ok=True)
    (folder / FAILURE).unlink(missing_ok=True)
    shutil.rmtree(folder / "venv", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    python = str(environment.python(peers_dir))
    commands = [[sys.executable, "-m", "venv", str(folder / "venv")]]
    commands += [[python, "-m", "pip", "install", *arguments] for arguments in environment.installs]
    commands += [[python, "-c", environment.code]]
    tools = {**os.environ, "PATH": f"{Path(python).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    with (folder / "install.log").open("w", encoding="utf-8") as log:
        for command in commands:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=tools, check=False).returncode:
                return _note_failure(folder, command)
    stamp.write_text(recipe, encoding="utf-8")
    return None


def why_missing(environment: Environment, peers_dir: Path) -> str | None:
    """Why a venv cannot be used, or None where it can."""
    folder = peers_dir / environment.name
    if (folder / FAILURE).is_file():
        return (folder / FAILURE).read_text(encoding="utf-8").strip()
    if not (folder / STAMP).is_file():
        return f"the venv {environment.name!r} was not made: python -m benchmarks.peers.install"
    return None


def _note_failure(folder: Path, command: list[str]) -> str:
    lines = (folder / "install.log").read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line.strip() for line in lines if line.lstrip().lower().startswith("error")]
    reason = f"`{' '.join(command[1:])}` failed: {(errors or lines)[-1]}"  # the command itself is a line of the log
    (folder / FAILURE).write_text(reason + "\n", encoding="utf-8")
    return reason


def main() -> None:
    """Make all, or what `--only` names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(".peers"), help="the folder for venvs and models")
    parser.add_argument("--only", default=",".join(ENVIRONMENTS), help="names of venvs, with commas between")
    arguments = parser.parse_args()
    names = [name for name in arguments.only.split(",") if name]
    if unknown := sorted(set(names) - set(ENVIRONMENTS)):
        parser.error(f"no venv {', '.join(unknown)}; there are {', '.join(ENVIRONMENTS)}")
    for name in names:
        print(f"{name}: ", end="", flush=True)
        print(install(ENVIRONMENTS[name], arguments.dir.absolute()) or "ready", flush=True)
    subprocess.run([sys.executable, "-m", "benchmarks.peers.models", str(arguments.dir / "models")], check=True)


if __name__ == "__main__":
    main()
