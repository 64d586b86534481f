"""Components with random weights: the real classes at their real size, without files.

They are created on their device in their dtype, and are reproducible. Matrices have a standard
deviation of fan_in**-0.5, norms are one and biases zero, so that activations stay finite through
any number of blocks in any dtype.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from string import ascii_lowercase
from typing import Any

import torch
import transformers
from diffusers import ModelMixin, UniPCMultistepScheduler
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CLIPVisionConfig, PreTrainedTokenizerFast, UMT5Config

from wancli.catalog.hf_configs import CLASSES, part_config
from wancli.catalog.specs import ModelSpec

# While it creates a model, transformers replaces torch's initialisers by its own.
_INITS = ("torch.nn.init", "transformers.initialization")
_CONFIGS = {"text_encoder": UMT5Config, "image_encoder": CLIPVisionConfig}


def random_part(
    kind: Any, spec: ModelSpec, name: str, *, dtype: torch.dtype, device: torch.device,
    draw_on: torch.device | None = None,
) -> Any:  # fmt: skip
    """Create one component; modules that diffusers keeps in float32 are in float32.

    It is kept on `device`, and drawn there or on another that is faster, weight by weight.
    Two experts differ. The VAE's latents are not rescaled: mean 0, standard deviation 1.
    """
    config = part_config(spec.wan, name)
    if name == "vae":
        channels = spec.latent_channels
        config |= {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    with default_dtype(dtype), device, _SkipInit(), torch.random.fork_rng([]):
        as_config = _CONFIGS.get(name)
        model = kind(as_config(**config)) if as_config else kind(**config)
    wide = float32_modules(model, dtype)
    for path, parameter in model.named_parameters():
        if not wide.isdisjoint(path.split(".")):
            parameter.data = parameter.data.to(torch.float32)
    fill(model, seed=zlib.crc32(name.encode()), draw_on=draw_on)
    return model.eval()


def random_components(
    spec: ModelSpec, *, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """The components of a pipeline beside transformers, VAE and image encoder."""
    kind = getattr(transformers, CLASSES["text_encoder"])
    rest = {
        "text_encoder": random_part(kind, spec, "text_encoder", dtype=dtype, device=device),
        "tokenizer": byte_tokenizer(spec),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        ),
    }
    if spec.image_encoder:
        rest["image_processor"] = transformers.CLIPImageProcessor()
    if spec.per_token_time:
        rest["expand_timesteps"] = True
    if spec.boundary_ratio:
        rest["boundary_ratio"] = spec.boundary_ratio
    return rest


@torch.no_grad()
def fill(model: nn.Module, *, seed: int, draw_on: torch.device | None = None) -> None:
    """Draw every weight on its device or another, reproducibly there for a seed."""
    device = draw_on or next(model.parameters()).device
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
    for path, parameter in model.named_parameters():
        name = path.rpartition(".")[2]
        if name == "bias":
            parameter.zero_()
        elif name == "gamma" or (name == "weight" and parameter.ndim == 1):
            parameter.fill_(1)  # of a norm
        else:
            fan_in = parameter[0].numel()
            drawn = parameter.to(device)  # itself, if it is there
            drawn.normal_(0, fan_in**-0.5, generator=generator)
            parameter.copy_(drawn)


def byte_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerFast:
    """A tokenizer without a vocabulary file: one token per byte.

    For a text encoder with a smaller vocabulary, the letters a to z come first and the rest is
    unknown. Prompts are padded to the length of the real tokenizer's.
    """
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(ascii_lowercase))
    tokens = ["<pad>", "</s>", "<unk>", *ascii_lowercase, *alphabet]
    tokens = tokens[: spec.wan.text_encoder.vocabulary]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return ended_by_eos(tokenizer, length=spec.text_length)


def ended_by_eos(tokenizer: Tokenizer, *, length: int) -> PreTrainedTokenizerFast:
    """A tokenizer as UMT5's: it ends a text with `</s>` (1), and pads it to `length`."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    )


class _SkipInit(TorchFunctionMode):
    """Skips the initialisers of modules: `fill` draws every weight afterwards."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") in _INITS:
            tensor: Tensor = args[0] if args else kwargs["tensor"]
            return tensor
        return func(*args, **kwargs)


def float32_modules(model: Any, dtype: torch.dtype) -> frozenset[str]:
    """Names of modules that stay in float32; transformers has them for float16 only."""
    if isinstance(model, ModelMixin):
        return frozenset(model._keep_in_fp32_modules or ())
    return frozenset(model._keep_in_fp32_modules if dtype == torch.float16 else ())


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create modules in that dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
