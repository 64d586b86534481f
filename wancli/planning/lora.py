"""LoRA files with their scale, and which expert they are for."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from wancli.catalog.tasks import EXPERTS
from wancli.errors import InputError, PlanError, SettingsError, missing
from wancli.utils.reading import check_tensors, user_path

_DEMO = Path(__file__).parents[1] / "demo" / "loras"
PACKAGED = {path.stem: path for path in _DEMO.glob("*.safetensors")}  # LoRAs known by name


@dataclass(frozen=True)
class Lora:
    """A LoRA file, its scale, and the expert it applies to."""

    path: Path
    scale: float = 1.0
    expert: str = ""  # high or low; "" for a single expert


def find_lora(text: str) -> Lora:
    """Parse `PATH` or `PATH=SCALE`, with `@high` or `@low` after PATH for one of two experts.

    PATH may be the name of a packaged LoRA, unless a file has that name.

    Raises InputError for a missing file, SettingsError for a bad scale.
    """
    path, scale = text, "1"
    if "=" in text and not Path(_of_expert(text)[0]).exists():
        path, _, scale = text.rpartition("=")
    name, expert = _of_expert(path)
    try:
        lora = Lora(_place(name), float(scale), expert)
        if not isfinite(lora.scale):
            raise ValueError
    except ValueError:
        raise SettingsError(
            f"`lora {text}`: {scale!r} is not a scale.", hint=f"{path}=0.8"
        ) from None
    if not lora.path.is_file():
        raise missing("LoRA", lora.path)
    return lora


def _place(name: str) -> Path:
    path = user_path(name)
    return path if path.exists() else PACKAGED.get(name, path)


def _of_expert(path: str) -> tuple[str, str]:
    """Split off `@high` or `@low`, unless a file has that very name."""
    name, at, expert = path.rpartition("@")
    return (name, expert) if at and expert in EXPERTS and not Path(path).exists() else (path, "")


def check_loras(texts: Sequence[str], *, model: str, experts: int) -> None:
    """Raise InputError for a file that is missing or no LoRA, PlanError for a wrong expert."""
    for lora in map(find_lora, texts):
        if experts > 1 and not lora.expert:
            raise PlanError(
                f"`lora {lora.path}` does not say which of {model}'s two experts it is for.",
                hint=f"`lora` {lora.path}@high, @low, or once each",
            )
        if experts < 2 and lora.expert:
            raise PlanError(
                f"`lora` {lora.path}@{lora.expert}: {model} has one expert.",
                hint=f"`lora {lora.path}`",
            )
        _check_kind(lora.path)


def _check_kind(path: Path) -> None:
    """Raise InputError unless the file is safetensors or a torch pickle."""
    try:
        check_tensors(path)
    except (OSError, ValueError):
        raise InputError(
            f"{path} is not a LoRA, or is broken.", hint="give a .safetensors or .pt file"
        ) from None
