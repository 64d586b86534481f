"""The rollout that is to go on: where it is, and what it was asked for."""

from pathlib import Path
from typing import Any

from wancli.errors import InputError
from wancli.records.naming import with_name
from wancli.records.record import ROLLOUT_FILE, ROLLOUT_SCHEMA
from wancli.records.schema import AskedRollout, check_told
from wancli.utils.reading import parse_json, read_text, unreadable, user_path


def find_rollout(
    prompt: str | None, output: str | None, latents: Path | None, folder: Path
) -> Path:
    """The folder of the rollout that is meant: by its output's name, or the newest of that prompt.

    Raises InputError where there is none.
    """
    name = output if output and "{" not in output else None
    if name or latents:
        path = with_name(user_path(name or str(latents)))
        named = path if len(path.parts) > 1 or not name else folder / path
        return named.with_suffix(".rollout")
    found = sorted(folder.glob(f"*.rollout/{ROLLOUT_FILE}"), key=lambda p: -p.stat().st_mtime)
    for path in found:
        if prompt in (None, stored_request(path.parent).get("prompt")):
            return path.parent
    raise InputError(
        f"there is no rollout of that prompt in {folder}.",
        hint="--output NAME.mp4 of the first run",
    )


def stored_request(store: Path) -> dict[str, Any]:
    """What a rollout was asked for. Raises InputError."""
    path = store / ROLLOUT_FILE
    try:
        text = read_text(path)
        told = parse_json(text)
    except FileNotFoundError:
        raise InputError(
            f"there is no rollout to go on with: no {path}.", hint="run it without --resume"
        ) from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error, hint="another --output") from None
    if told.get("schema") != ROLLOUT_SCHEMA:
        raise InputError(f"{path} is of no rollout of wancli's.", hint="another --output")
    check_told(text, AskedRollout, origin=str(path))
    return told
