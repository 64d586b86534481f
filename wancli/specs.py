"""Facts about models: what their authors fixed. Choices live in `presets/`.

Sources, for the released models: wan/configs/ of https://github.com/Wan-Video/Wan2.1 (9737cba) and
https://github.com/Wan-Video/Wan2.2 (42bf4cf), and scripts/convert_wan_to_diffusers.py of
https://github.com/huggingface/diffusers (58eb52c).
"""

from dataclasses import dataclass, field
from pathlib import Path

from wancli.geometry import Strides

DEMO_FOLDER = Path(__file__).parent / "demo" / "model"
TEXT_LENGTH = 512  # tokens, in every released Wan


@dataclass(frozen=True)
class ModelSpec:
    """What one model is."""

    name: str
    repo: str  # hub id, or "" for a folder
    description: str
    task: str = "text-to-video"
    strides: Strides = field(default_factory=Strides)
    latent_channels: int = 16
    text_length: int = TEXT_LENGTH
    layers: int = 0  # transformer blocks; 0 is unknown
    dim: int = 0  # of a token inside the transformer; 0 is unknown
    experts: int = 1  # 2: one transformer for high noise, one for low
    causal: bool | None = None  # trained to go on from chunk to chunk; None is unknown
    folder: Path | None = None  # where its files are, when that is known before loading


SPECS = {
    spec.name: spec
    for spec in (
        ModelSpec(
            "demo",
            "",
            "Tiny trained Wan that draws moving shapes; inside the package.",
            latent_channels=8,
            text_length=64,
            causal=True,
            folder=DEMO_FOLDER,
            layers=8,
            dim=128,
        ),
        ModelSpec(
            "wan2.1-t2v-1.3b",
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            "Wan 2.1 text-to-video, 1.3B parameters, 480p.",
            causal=False,
            layers=30,
            dim=1536,
        ),
        ModelSpec(
            "wan2.1-t2v-14b",
            "Wan-AI/Wan2.1-T2V-14B-Diffusers",
            "Wan 2.1 text-to-video, 14B parameters, 480p and 720p.",
            causal=False,
            layers=40,
            dim=5120,
        ),
        ModelSpec(
            "wan2.2-t2v-a14b",
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            "Wan 2.2 text-to-video, two experts of 14B parameters, 480p and 720p.",
            experts=2,
            causal=False,
            layers=40,
            dim=5120,
        ),
        ModelSpec(
            "wan2.2-ti2v-5b",
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            "Wan 2.2 text-to-video, 5B parameters, 720p at 24 frames per second.",
            strides=Strides(temporal=4, spatial=16, patch=2),
            latent_channels=48,
            causal=False,
            layers=30,
            dim=3072,
        ),
        ModelSpec(
            "self-forcing",
            "gueraf/Self-Forcing-diffusers",
            "Self-Forcing (arXiv:2506.08009) on Wan 2.1 1.3B: 4 steps a chunk, for rollouts.",
            causal=True,
            layers=30,
            dim=1536,
        ),
        ModelSpec(
            "self-forcing-a14b",
            "rand0nmr/SFWan2.2-T2V-A14B-Diffusers",
            "Self-Forcing on Wan 2.2 A14B, two experts: 8 steps a chunk, for rollouts.",
            experts=2,
            causal=True,
            layers=40,
            dim=5120,
        ),
    )
}
