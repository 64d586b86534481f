"""LoRA files as they are asked for."""

from dataclasses import dataclass
from pathlib import Path

from wancli.errors import SettingsError, missing


@dataclass(frozen=True)
class Lora:
    """A LoRA file, and how much of it."""

    path: Path
    scale: float = 1.0


def find_lora(text: str) -> Lora:
    """`PATH` or `PATH=SCALE`. Raises InputError where there is no such file, SettingsError."""
    path, equals, scale = text.rpartition("=")
    if not equals or Path(text).exists():
        path, scale = text, "1"
    try:
        lora = Lora(Path(path).expanduser(), float(scale))
    except ValueError:
        raise SettingsError(f"--lora {text}: {scale!r} is no scale.", hint=f"{path}=0.8") from None
    if not lora.path.is_file():
        raise missing("LoRA", lora.path)
    return lora
