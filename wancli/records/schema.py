"""Types of the fields read back from records, which anybody may have written."""

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


class _Schema(BaseModel):
    """Base of all; extra keys are allowed, since a record holds more than is read back."""

    model_config = ConfigDict(strict=True, extra="allow")


class File(_Schema):
    """An input file of a request."""

    name: str
    sha256: str
    path: str | None = None


class Inputs(_Schema):
    """Inputs of a request beside prompt, seed and settings."""

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


class Weights(_Schema):
    """Weights of one part in a file of their own."""

    part: str
    name: str
    digest: str
    path: str | None = None


class StoredRequest(_Schema):
    """A request; its settings are checked when they are resolved."""

    prompt: str
    seed: Seed
    model: str
    model_revision: str = ""
    output: Table = {}
    weights: list[Weights] = []
    inputs: Inputs = Inputs()


class Length(_Schema):
    """Length of a rollout."""

    num_frames: Count


class Chunks(_Schema):
    """Chunks of a rollout."""

    chunks: Count
    chunk_frames: Count


class StoredRolloutRequest(StoredRequest):
    """The request of a rollout, also stored while it runs."""

    video: Length
    rollout: Chunks


class Record(_Schema):
    """The outcome of a request."""

    id: str
    status: str
    command: str
    created: str
    request: StoredRequest
    hash: str
    output: Table = {}


class RolloutRecord(Record):
    """The outcome of a rollout request."""

    request: StoredRolloutRequest


def check_schema(text: str, kind: type[BaseModel], *, origin: str) -> None:
    """Raise InputError for JSON that does not match the schema `kind`."""
    try:
        kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise InputError(
            f"{origin} is a broken record: {where}: {first['msg'][0].lower()}{first['msg'][1:]}.",
            hint="give the video itself, or the file as wancli wrote it",
        ) from None
