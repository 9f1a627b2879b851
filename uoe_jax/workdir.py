"""The directory of a run: whose it is, and the configuration and record stored in it. Imports no jax."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from etils import epath

from uoe_jax import processes
from uoe_jax.config import Config, changed_keys, from_dict, to_dict
from uoe_jax.errors import UserError

CONFIG, RECORD = "config.json", "record.json"
SHOWS_UP_S = 10  # a network file system may show a new file late


def open_workdir(path: str, config: Config) -> epath.Path:
    """Makes or enters a workdir and stores the resolved configuration; returns its path.

    Raises:
      UserError: it holds something else or another run, or cannot be written.
    """
    workdir = epath.Path(path).expanduser()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        there = sorted(p.name for p in workdir.iterdir() if not p.name.startswith("error"))
        if there and CONFIG not in there:
            raise UserError(f"--workdir={path}: holds other files ({there[0]}, …) and no run; give an empty directory")
        if CONFIG in there:
            _refuse_other_run(path, read_config(path), config)
        write_json(workdir / CONFIG, to_dict(config))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--workdir={path}: cannot be written ({reason}); give a directory you may write to") from error
    return workdir


def enter_workdir(path: str, config: Config) -> epath.Path:
    """`open_workdir` by process 0; the same directory, absolute, in every process.

    Raises:
      UserError: as `open_workdir`, or another process does not see what process 0 wrote there.
    """

    def opened() -> list[str]:
        workdir = open_workdir(path, config)
        workdir = workdir if "://" in path else workdir.resolve()
        return [str(workdir), (workdir / CONFIG).read_text()]

    name, written = processes.by_first(opened)
    workdir = epath.Path(name)

    def seen() -> None:
        patience = time.monotonic() + SHOWS_UP_S
        while not ((workdir / CONFIG).exists() and (workdir / CONFIG).read_text() == written):
            if time.monotonic() > patience:
                raise UserError(
                    f"--workdir={path}: this process does not find in {name} what process 0 wrote there; give a directory "
                    "that all machines share"
                )
            time.sleep(0.1)

    processes.together(seen)
    return workdir


def _refuse_other_run(path: str, old: Config, new: Config) -> None:
    changed = changed_keys(old, new)
    if changed:
        name, before, now = changed[0]
        more = f" (and {len(changed) - 1} more keys)" if len(changed) > 1 else ""
        raise UserError(
            f"config.{name}={now!r}: the run in {path} was started with {before!r}{more}; "
            "give the old value, or another --workdir"
        )


def check_record(workdir: epath.PathLike, record: dict[str, Any]) -> None:
    """Stores what the run's data are, or on resume refuses data that are not the same.

    Raises:
      UserError: the content hash of the data differs from the stored one.
    """
    path = epath.Path(workdir).expanduser() / RECORD
    if path.exists():
        old = json.loads(path.read_text())["data"]
        for name in ("sha256", "tokenizer"):
            if old.get(name) != record.get(name):
                raise UserError(
                    f"data.{name}={record.get(name)!r}: the run in {workdir} was trained on {old.get(name)!r}; "
                    "use the interpreter and files it was started with, or another --workdir"
                )
    else:
        write_json(path, {"data": record})


def read_config(path: str) -> Config:
    """The resolved configuration of the run in a workdir.

    Raises:
      UserError: there is no run, or its config.json cannot be used.
    """
    file = epath.Path(path).expanduser() / CONFIG
    if not file.exists():
        raise UserError(f"--workdir={path}: no run there (config.json is missing); train one with uoe train")
    try:
        return from_dict(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); restore it, or start in another --workdir") from error


def write_json(path: epath.Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)
