"""Facts about models: what their authors fixed. Choices live in `presets/`.

Sources, for the released models: wan/configs/ of https://github.com/Wan-Video/Wan2.1 (9737cba) and
https://github.com/Wan-Video/Wan2.2 (42bf4cf), and scripts/convert_wan_to_diffusers.py of
https://github.com/huggingface/diffusers (58eb52c); for tasks, the pipelines of diffusers 0.42.1.
WanVideoToVideoPipeline supports one expert, and VAEs of Wan 2.1. HunyuanVideo: see `hunyuan.py`.
Checkpoints and their entries: README.md of https://github.com/thu-ml/Causal-Forcing (1fc7bbc; its
`--use_ema` takes `generator_ema`); README.md and minimal_inference/autoregressive_inference.py of
https://github.com/tianweiy/CausVid (ca21150); README.md and utils/nvfp4_checkpoint.py (7860ad9), of
LongLive 1 README.md and configs/longlive_inference.yaml (e52d9ef) of
https://github.com/NVlabs/LongLive; README.md of https://github.com/krea-ai/realtime-video
(acf4b7b).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from wancli.catalog.geometry import Strides
from wancli.catalog.hunyuan import TEXT_TOKENS, HunyuanVideo
from wancli.catalog.tasks import (
    ANIMATE,
    ENDS,
    HUNYUAN_TEXT,
    IMAGE,
    TASKS,
    TEXT,
    VACE,
    VIDEO,
    Family,
)
from wancli.catalog.tiny_decoder import TinyDecoderShape
from wancli.catalog.wan import (
    ANIMATE_14B,
    DEMO,
    VACE_1_3B,
    VACE_14B,
    WAN_1_3B,
    WAN_2_1_I2V,
    WAN_2_2_I2V,
    WAN_5B,
    WAN_14B,
    WAN_FLF2V,
    Architecture,
)
from wancli.utils.gguf import QUANTIZED
from wancli.utils.reading import Stored

DEMO_FOLDER = Path(__file__).parents[1] / "demo" / "model"
TEXT_LENGTH = 512  # tokens, in every released Wan
RANDOM = "random:"  # prefix of models with random weights


@dataclass(frozen=True)
class PackedWeights:
    """Weights of a block, or of no block, that are quantized in their file and stay so."""

    block: str = ""
    parameters: int = 0
    bytes: int = 0
    beside: int = 0  # parameters of LoRAs that are not merged into them

    def plus(self, parameters: int, nbytes: int) -> "PackedWeights":
        """These and more of the block."""
        return replace(self, parameters=self.parameters + parameters, bytes=self.bytes + nbytes)


@dataclass(frozen=True)
class WeightFile:
    """One part's weights in a file of their own, instead of the model's; see weight_files.py."""

    part: str  # of a pipeline
    path: Path
    digest: str
    keys: int  # of the whole file
    parameters: int
    bytes: int  # as stored, without scales
    dtypes: tuple[str, ...]  # safetensors' or ggml's names, the most common first
    scales: int = 0  # number of weights in fp8 that have one
    packed: tuple[PackedWeights, ...] = ()

    @classmethod
    def of(
        cls, part: str, path: Path, *, digest: str, keys: int, tensors: Sequence[Stored]
    ) -> "WeightFile":
        """The file of a part whose weights are these `tensors` of it."""
        dtypes = Counter(tensor.dtype for tensor in tensors)
        return cls(
            part,
            path,
            digest,
            keys,
            parameters=sum(prod(tensor.shape) for tensor in tensors),
            bytes=sum(tensor.end - tensor.begin for tensor in tensors),
            dtypes=tuple(dtype for dtype, _ in dtypes.most_common()),
        )

    @property
    def quantized(self) -> bool:
        """Whether any of its weights are, as only GGUF has them."""
        return not QUANTIZED.isdisjoint(self.dtypes)


@dataclass(frozen=True)
class Checkpoint:
    """A transformer in its authors' format, which `wancli model pull` makes a model folder of."""

    repo: str  # hub id
    file: str
    base: str  # the known model that the other components are from
    entry: str = ""  # of a pickle that has several; as `wancli model convert` takes it
    lora: str = ""  # another file of the repository, which is merged


@dataclass(frozen=True)
class ModelSpec:
    """Facts about one model."""

    name: str
    repo: str  # hub id, or "" for a folder or a checkpoint
    description: str
    tasks: tuple[str, ...] = (TEXT,)  # in order of preference for given inputs
    strides: Strides = field(default_factory=Strides)
    latent_channels: int = 16
    text_length: int = TEXT_LENGTH
    architecture: Architecture | HunyuanVideo | None = None  # None is unknown
    per_token_time: bool = False  # one timestep per token
    experts: int = 1  # 2: one transformer for high noise, one for low
    boundary_ratio: float | None = None  # noise level (0-1) below which the low-noise expert runs
    image_encoder: bool = False  # CLIP image conditioning
    causal: bool | None = None  # trained for autoregressive rollout; None is unknown
    clips: bool = True  # trained to denoise whole videos, too
    folder: Path | None = None  # of its files, if known before loading
    random: bool = False  # random weights, not read from a file
    draws: str = ""  # all that a small model knows
    files: tuple[WeightFile, ...] = ()
    checkpoint: Checkpoint | None = None  # it is converted from, once pulled
    tiny_decoder: TinyDecoderShape | None = None  # that decodes instead of its VAE

    def file_of(self, part: str) -> WeightFile | None:
        """The file that a part is read from, if it is not the model's own."""
        return next((file for file in self.files if file.part == part), None)

    def packed_in(self, part: str) -> tuple[PackedWeights, ...]:
        """The weights of a part that stay quantized in memory, as in their file."""
        file = self.file_of(part)
        return file.packed if file else ()

    @property
    def pulled_from(self) -> str:
        """The hub's repository that it is pulled from, converted or not; "" for none."""
        return self.checkpoint.repo if self.checkpoint else self.repo

    @property
    def on_hub(self) -> bool:
        """Whether its files come from the hub."""
        return self.folder is None and not self.random

    @property
    def wan(self) -> Architecture:
        """The architecture of a Wan. Raises ValueError for any other model."""
        if not isinstance(self.architecture, Architecture):
            raise ValueError(f"{self.name} has no shape of Wan")
        return self.architecture

    @property
    def layers(self) -> int:
        """Transformer blocks; 0 is unknown."""
        return sum(self.architecture.blocks) if self.architecture else 0

    @property
    def shortest(self) -> int:
        """Blocks in the transformer's shortest list of blocks; 0 is unknown."""
        return min(self.architecture.blocks) if self.architecture else 0

    @property
    def dim(self) -> int:
        """Hidden size of the transformer; 0 is unknown."""
        return self.architecture.transformer.dim if self.architecture else 0

    @property
    def family(self) -> Family:
        """The family of its pipelines."""
        return TASKS[self.tasks[0]].family


def _causal_forcing(file: str, *, entry: str) -> Checkpoint:
    return Checkpoint("zhuhz22/Causal-Forcing", file, base="wan2.1-t2v-1.3b", entry=entry)


def _rcm(size: str, *, base: str) -> Checkpoint:
    return Checkpoint("worstcoder/rcm-Wan", f"rCM_Wan2.1_T2V_{size}.pt", base=base)


def _distilled(
    name: str, description: str, checkpoint: Checkpoint, *, causal: bool,
    architecture: Architecture = WAN_1_3B,
) -> ModelSpec:  # fmt: skip
    """A model for rollouts alone, or for whole videos alone, by its authors' checkpoint."""
    return ModelSpec(
        name, "", description, causal=causal, clips=not causal, architecture=architecture,
        checkpoint=checkpoint,
    )  # fmt: skip


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
            architecture=DEMO,
            draws="one red, green, blue, yellow, purple, orange, white or cyan circle, square or "
            "triangle, moving right, left, up or down, bouncing, circling, spinning, pulsing or "
            "standing still, on a black, gray, navy or brown background",
        ),
        ModelSpec(
            "wan2.1-t2v-1.3b",
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            "Wan 2.1 text-to-video, 1.3B parameters, 480p.",
            tasks=(TEXT, VIDEO),
            causal=False,
            architecture=WAN_1_3B,
        ),
        ModelSpec(
            "wan2.1-t2v-14b",
            "Wan-AI/Wan2.1-T2V-14B-Diffusers",
            "Wan 2.1 text-to-video, 14B parameters, 480p and 720p.",
            tasks=(TEXT, VIDEO),
            causal=False,
            architecture=WAN_14B,
        ),
        ModelSpec(
            "wan2.2-t2v-a14b",
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            "Wan 2.2 text-to-video, two experts of 14B parameters, 480p and 720p.",
            experts=2,
            boundary_ratio=0.875,
            causal=False,
            architecture=WAN_14B,
        ),
        ModelSpec(
            "wan2.2-ti2v-5b",
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            "Wan 2.2 text- and image-to-video, 5B parameters, 720p at 24 frames per second.",
            tasks=(TEXT, IMAGE),
            strides=Strides(temporal=4, spatial=16, patch=2),
            latent_channels=48,
            per_token_time=True,
            causal=False,
            architecture=WAN_5B,
        ),
        ModelSpec(
            "wan2.1-i2v-14b-480p",
            "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
            "Wan 2.1 image-to-video, 14B parameters, 480p.",
            tasks=(IMAGE,),
            image_encoder=True,
            causal=False,
            architecture=WAN_2_1_I2V,
        ),
        ModelSpec(
            "wan2.1-i2v-14b-720p",
            "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
            "Wan 2.1 image-to-video, 14B parameters, 720p.",
            tasks=(IMAGE,),
            image_encoder=True,
            causal=False,
            architecture=WAN_2_1_I2V,
        ),
        ModelSpec(
            "wan2.1-flf2v-14b",
            "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
            "Wan 2.1 from a first to a last picture, 14B parameters, 720p.",
            tasks=(ENDS,),
            image_encoder=True,
            causal=False,
            architecture=WAN_FLF2V,
        ),
        ModelSpec(
            "wan2.1-vace-1.3b",
            "Wan-AI/Wan2.1-VACE-1.3B-diffusers",
            "VACE on Wan 2.1: videos, masks and pictures as references, 1.3B parameters, 480p.",
            tasks=(VACE,),
            causal=False,
            architecture=VACE_1_3B,
        ),
        ModelSpec(
            "wan2.1-vace-14b",
            "Wan-AI/Wan2.1-VACE-14B-diffusers",
            "VACE on Wan 2.1: the same, 14B parameters, 480p and 720p.",
            tasks=(VACE,),
            causal=False,
            architecture=VACE_14B,
        ),
        ModelSpec(
            "wan2.2-i2v-a14b",
            "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
            "Wan 2.2 image-to-video, two experts of 14B parameters, 480p and 720p.",
            tasks=(IMAGE, ENDS),
            experts=2,
            boundary_ratio=0.9,
            causal=False,
            architecture=WAN_2_2_I2V,
        ),
        ModelSpec(
            "wan2.2-animate-14b",
            "Wan-AI/Wan2.2-Animate-14B-Diffusers",
            "Wan-Animate: a picture moves as a video does, or takes its place; 14B, 720p.",
            tasks=(ANIMATE,),
            image_encoder=True,
            causal=False,
            architecture=ANIMATE_14B,
        ),
        ModelSpec(
            "self-forcing",
            "gueraf/Self-Forcing-diffusers",
            "Self-Forcing (arXiv:2506.08009) on Wan 2.1 1.3B: 4 steps per chunk, for rollouts.",
            causal=True,
            clips=False,
            architecture=WAN_1_3B,
        ),
        ModelSpec(
            "self-forcing-a14b",
            "rand0nmr/SFWan2.2-T2V-A14B-Diffusers",
            "Self-Forcing on Wan 2.2 A14B, two experts: 8 steps per chunk, for rollouts.",
            experts=2,
            causal=True,
            clips=False,
            architecture=WAN_14B,
        ),
        _distilled(
            "causal-forcing",
            "Causal Forcing (arXiv:2602.02214) on Wan 2.1 1.3B: 4 steps per chunk, for rollouts.",
            _causal_forcing("chunkwise/causal_forcing.pt", entry="generator"),
            causal=True,
        ),
        _distilled(
            "causal-forcing-frame",
            "Causal Forcing, 4 steps per latent frame, for rollouts; starts from an image, too.",
            _causal_forcing("framewise/causal_forcing.pt", entry="generator_ema"),
            causal=True,
        ),
        _distilled(
            "causal-forcing-2step",
            "Causal Forcing++ (arXiv:2605.15141): 2 steps per latent frame, for rollouts.",
            _causal_forcing("causal-forcing++/framewise-2step.pt", entry="generator_ema"),
            causal=True,
        ),
        _distilled(
            "causal-forcing-1step",
            "Causal Forcing++: 1 step per latent frame, for rollouts.",
            _causal_forcing("causal-forcing++/framewise-1step.pt", entry="generator_ema"),
            causal=True,
        ),
        _distilled(
            "longlive",
            "LongLive (arXiv:2509.22622) on Wan 2.1 1.3B: long videos, many prompts, for rollouts.",
            Checkpoint(
                "Efficient-Large-Model/LongLive-1.3B",
                "models/longlive_base.pt",
                base="wan2.1-t2v-1.3b",
                entry="generator",
                lora="models/lora.pt",
            ),
            causal=True,
        ),
        _distilled(
            "krea-realtime-14b",
            "Krea Realtime on Wan 2.1 14B: 5 steps per chunk, for rollouts.",
            Checkpoint(
                "krea/krea-realtime-video",
                "krea-realtime-video-14b.safetensors",
                base="wan2.1-t2v-14b",
            ),
            causal=True,
            architecture=WAN_14B,
        ),
        _distilled(
            "causvid",
            "CausVid (arXiv:2412.07772) on Wan 2.1 1.3B: 3 steps per chunk, for rollouts.",
            Checkpoint(
                "tianweiy/CausVid",
                "autoregressive_checkpoint/model.pt",
                base="wan2.1-t2v-1.3b",
                entry="generator",
            ),
            causal=True,
        ),
        _distilled(
            "causvid-bidirectional",
            "CausVid's bidirectional model on Wan 2.1 1.3B: 5 seconds in 3 steps.",
            Checkpoint(
                "tianweiy/CausVid",
                "bidirectional_checkpoint2/model.pt",
                base="wan2.1-t2v-1.3b",
                entry="generator",
            ),
            causal=False,
        ),
        _distilled(
            "rcm-t2v-1.3b",
            "rCM (arXiv:2510.08431) on Wan 2.1 1.3B: 480p in 4 steps.",
            _rcm("1.3B_480p", base="wan2.1-t2v-1.3b"),
            causal=False,
        ),
        _distilled(
            "rcm-t2v-14b-480p",
            "rCM on Wan 2.1 14B: 480p in 4 steps.",
            _rcm("14B_480p", base="wan2.1-t2v-14b"),
            causal=False,
            architecture=WAN_14B,
        ),
        _distilled(
            "rcm-t2v-14b-720p",
            "rCM on Wan 2.1 14B: 720p in 4 steps.",
            _rcm("14B_720p", base="wan2.1-t2v-14b"),
            causal=False,
            architecture=WAN_14B,
        ),
        ModelSpec(
            "longlive2",
            "",
            "LongLive 2.0 (arXiv:2605.18739) on Wan 2.2 5B: 4 steps per chunk, for rollouts.",
            strides=Strides(temporal=4, spatial=16, patch=2),
            latent_channels=48,
            per_token_time=True,
            causal=True,
            clips=False,
            architecture=WAN_5B,
            checkpoint=Checkpoint(
                "Efficient-Large-Model/LongLive-2.0-5B",
                "model_bf16.pt",
                base="wan2.2-ti2v-5b",
                entry="generator",
            ),
        ),
        ModelSpec(
            "hunyuanvideo",
            "hunyuanvideo-community/HunyuanVideo",
            "HunyuanVideo text-to-video, 13B parameters, 720p at 24 frames per second.",
            tasks=(HUNYUAN_TEXT,),
            text_length=TEXT_TOKENS,
            causal=False,
            architecture=HunyuanVideo(),
        ),
    )
}


def converted_from(repo: str, file: str) -> str:
    """Name of the known model that is converted from a file of a repository; "" if none is."""
    checkpoints = ((spec.name, spec.checkpoint) for spec in SPECS.values() if spec.checkpoint)
    names = (name for name, of in checkpoints if of.repo == repo and file in (of.file, of.lora))
    return next(names, "") if file else ""


def name_of(repo: str) -> str:
    """Name of the known model in a repository of the hub; of any other, the repository."""
    return next((spec.name for spec in SPECS.values() if repo and spec.repo == repo), repo)
