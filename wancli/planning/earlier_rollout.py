"""Find the rollout to continue, and read its request."""

from pathlib import Path
from typing import Any

from wancli.errors import InputError
from wancli.records.naming import with_name
from wancli.records.record import ROLLOUT_FILE, ROLLOUT_SCHEMA
from wancli.records.schema import StoredRolloutRequest, check_schema
from wancli.utils.reading import parse_json, read_text, unreadable, user_path


def find_rollout(
    prompt: str | None, output: str | None, latents: Path | None, folder: Path
) -> Path:
    """Folder of the rollout with that output name, or of the newest one with that prompt.

    Raises InputError if there is none.
    """
    name = output if output and "{" not in output else None
    if name or latents:
        path = with_name(user_path(name or str(latents)))
        named = path if len(path.parts) > 1 or not name else folder / path
        return named.with_suffix(".rollout")
    paths = sorted(folder.glob(f"*.rollout/{ROLLOUT_FILE}"), key=lambda p: -p.stat().st_mtime)
    for path in paths:
        if prompt in (None, stored_request(path.parent).get("prompt")):
            return path.parent
    raise InputError(
        f"no rollout of that prompt in '{folder}'.",
        hint="name the video of the first run: `output NAME.mp4`",
    )


def stored_request(store: Path) -> dict[str, Any]:
    """The request of a stored rollout. Raises InputError."""
    path = store / ROLLOUT_FILE
    try:
        text = read_text(path)
        request = parse_json(text)
    except FileNotFoundError:
        raise InputError(
            f"no rollout to resume: {path} does not exist.", hint="run it without `resume`"
        ) from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error, hint="another `output`") from None
    if request.get("schema") != ROLLOUT_SCHEMA:
        raise InputError(f"{path} is not a wancli rollout.", hint="another `output`")
    check_schema(text, StoredRolloutRequest, origin=str(path))
    return request
