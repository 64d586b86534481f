"""The model that is measured: Wan2.1 1.3B, random weights, 480x832, chunks of 3 latents."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.session import Session
from wancli.catalog.geometry import LatentShape, latent_shape
from wancli.catalog.local import find_spec
from wancli.catalog.specs import ModelSpec
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import Machine, Settings
from wancli.models.load import load_pipeline, load_vae

CHUNK = 3  # latent frames
FRAMES = 12  # video frames of a chunk
TIMESTEPS = (1000.0, 937.5, 833.3333, 625.0)


@dataclass(frozen=True)
class Subject:
    """A model by name, and the size of its video."""

    name: str
    layers: int | None
    width: int
    height: int

    @property
    def spec(self) -> ModelSpec:
        """Its spec."""
        return find_spec(self.name, layers=self.layers)

    @property
    def shape(self) -> LatentShape:
        """Latents of one chunk, as if they were a video's later ones."""
        spec = self.spec
        return latent_shape(
            num_frames=1 + spec.strides.temporal * (CHUNK - 1), width=self.width,
            height=self.height, channels=spec.latent_channels, strides=spec.strides,
        )  # fmt: skip


def subject(session: Session) -> Subject:
    """Wan2.1 1.3B; for small sizes the packaged demo model."""
    if session.small:
        return Subject("demo", None, 32, 32)
    return Subject("random:self-forcing", None, 832, 480)


def load_transformer(session: Session, of: Subject, **machine: Any) -> Any:
    """Its transformer, in bfloat16 on a GPU."""
    loaded = load_pipeline(of.spec, machine_of(session, of, **machine), ["transformer"])
    return loaded.pipeline.transformer


def load_decoder(session: Session, of: Subject, **machine: Any) -> Any:
    """Its VAE."""
    return load_vae(of.spec, machine_of(session, of, **machine))[0]


def machine_of(session: Session, of: Subject, **machine: Any) -> Machine:
    """Settings of the machine."""
    table = {"device": session.device.type, "layers": of.layers, **machine}
    return resolve([Layer("flag", {"model": of.name, "machine": table})], Settings).settings.machine


def memory(session: Session) -> dict[str, float]:
    """Peak bytes of the device in GiB."""
    if session.device.type != "cuda":
        return {}
    return {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}


def latents(session: Session, of: Subject, *, seed: int, frames: int = CHUNK) -> Tensor:
    """Random latents [1, C, frames, H, W] in float32."""
    generator = torch.Generator().manual_seed(seed)
    size = (1, of.shape.channels, frames, of.shape.height, of.shape.width)
    return torch.randn(size, generator=generator).to(session.device)


def text(session: Session, of: Subject, transformer: Any) -> Tensor:
    """Random prompt embeddings [1, text, D]."""
    generator = torch.Generator().manual_seed(0)
    size = (1, of.spec.text_length, transformer.config.text_dim)
    return torch.randn(size, generator=generator).to(session.device)
