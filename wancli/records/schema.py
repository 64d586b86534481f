"""What is read back from records, and its types: anybody may have written the file."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from wancli.config.settings import MAX_SEED
from wancli.errors import InputError

Table = dict[str, Any]
Count = Annotated[int, Field(ge=1)]
Chunk = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


def _from_the_first(seeds: list[tuple[int, int]]) -> list[tuple[int, int]]:
    if seeds and seeds[0][0] != 0:
        raise ValueError("chunk 0 has none")
    return seeds


Seeds = Annotated[list[tuple[Chunk, Seed]], AfterValidator(_from_the_first)]


class _Read(BaseModel):
    """Other keys are let through: a record says more than is read back."""

    model_config = ConfigDict(strict=True, extra="allow")


class File(_Read):
    """A file that a request was given."""

    name: str
    sha256: str
    path: str | None = None


class Inputs(_Read):
    """What a request was given beside its prompt, seed and settings."""

    task: str | None = None
    image: File | None = None
    last_image: File | None = None
    video: File | None = None
    mask: File | None = None
    ref_image: list[File] = []
    pose_video: File | None = None
    face_video: File | None = None
    background_video: File | None = None
    changes: list[tuple[Chunk, str]] = []  # of the prompt
    seeds: Seeds = []  # in the order of chunks
    only_new: bool = False


class Asked(_Read):
    """A request: its settings are checked where they are resolved."""

    prompt: str
    seed: Seed
    model: str
    model_revision: str = ""
    output: Table = {}
    inputs: Inputs = Inputs()


class Length(_Read):
    """How long a rollout was."""

    num_frames: Count


class Chunks(_Read):
    """How a rollout was made."""

    chunks: Count
    chunk_frames: Count


class AskedRollout(Asked):
    """The request of a rollout, as it is kept while it is made."""

    video: Length
    rollout: Chunks


class Record(_Read):
    """What happened to a request."""

    id: str
    status: str
    command: str
    created: str
    request: Asked
    hash: str
    output: Table = {}


class RolloutRecord(Record):
    """What happened to that of a rollout."""

    request: AskedRollout


def check_told(text: str, kind: type[BaseModel], *, origin: str) -> None:
    """Raise InputError for JSON that lacks what is read back, or has it in another type."""
    try:
        kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise InputError(
            f"{origin} is a broken record: {where}: {first['msg'][0].lower()}{first['msg'][1:]}.",
            hint="give the video itself, or the file as wancli wrote it",
        ) from None
