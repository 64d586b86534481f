"""The rollout that is to go on: where it is, and what it was asked for."""

import json
from pathlib import Path
from typing import Any

from wancli.errors import InputError
from wancli.records import ROLLOUT_FILE, ROLLOUT_SCHEMA


def find_earlier(
    prompt: str | None, output: str | None, latents: Path | None, folder: Path
) -> Path:
    """The folder of the rollout that is meant: by its output's name, or the newest of that prompt.

    Raises InputError where there is none.
    """
    name = output if output and "{" not in output else None
    if name or latents:
        path = Path(name or str(latents)).expanduser()
        named = path if len(path.parts) > 1 or not name else folder / path
        return named.with_suffix(".rollout")
    found = sorted(folder.glob(f"*.rollout/{ROLLOUT_FILE}"), key=lambda p: -p.stat().st_mtime)
    for path in found:
        if prompt in (None, told_in(path.parent).get("prompt")):
            return path.parent
    raise InputError(
        f"there is no rollout of that prompt in {folder}.",
        hint="--output NAME.mp4 of the first run",
    )


def told_in(store: Path) -> dict[str, Any]:
    """What a rollout was asked for. Raises InputError."""
    path = store / ROLLOUT_FILE
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(
            f"there is no rollout to go on with: no {path}.", hint="run it without --resume"
        ) from None
    if not isinstance(told, dict) or told.get("schema") != ROLLOUT_SCHEMA:
        raise InputError(f"{path} is of no rollout of wancli's.", hint="another --output")
    return told
