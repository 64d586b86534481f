"""Find the rollout to continue, and read its request."""

from pathlib import Path
from typing import Any

from wancli.errors import InputError
from wancli.records.naming import NameTemplate, with_name
from wancli.records.record import ROLLOUT_FILE, ROLLOUT_SCHEMA
from wancli.records.schema import StoredRolloutRequest, check_schema
from wancli.utils.reading import parse_json, read_text, unreadable, user_path


def find_rollout(prompt: str | None, output: str | None, latents: str | None, folder: Path) -> Path:
    """Folder of the rollout with that name of its video or latents, or the newest of that prompt.

    Names are templates, of which those with fields name none. Raises InputError if there is none.
    """
    for template, place in ((output, folder), (latents, Path())):
        if template and (name := NameTemplate(template).name):
            path = with_name(user_path(name))
            return (path if len(path.parts) > 1 else place / path).with_suffix(".rollout")
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
