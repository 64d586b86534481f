"""Time one forward of the transformer as it is, compiled, fused and in 8 bits, in turns.

The prompt's keys and values are known, as they are in every step but the first. Says what each
saves in time, how far it is off, and what its weights take.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from wancli.caching.prompt_kv import PromptKVCache, prompt_kv
from wancli.catalog.geometry import latent_shape
from wancli.catalog.local import find_spec
from wancli.catalog.specs import ModelSpec
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import Settings
from wancli.models.load import Loaded, load_pipeline

WAYS: Mapping[str, Mapping[str, Any]] = {
    "as it is": {},
    "--compile": {"compile": True},
    "--fuse-qkv": {"fuse_qkv": True},
    "--quantize int8": {"quantize": "int8"},
    "--quantize fp8": {"quantize": "fp8"},
}
TIMESTEP = 500.0

say = logging.getLogger("bench").info


@dataclass
class Way:
    """A transformer, what it gave, and how long each forward took."""

    loaded: Loaded
    given: tuple[Tensor, Tensor, Tensor]
    memory: PromptKVCache = field(default_factory=PromptKVCache)
    seconds: list[float] = field(default_factory=list)

    @torch.no_grad()
    def forward(self) -> Tensor:
        """Velocity [1, C, F, H, W] in float32."""
        transformer = self.loaded.pipeline.transformer
        with prompt_kv(transformer, self.memory):
            velocity: Tensor = transformer(*self.given, return_dict=False)[0]
        return velocity.float().cpu()  # which waits for a GPU

    def time(self) -> None:
        """Another forward."""
        started = perf_counter()
        self.forward()
        self.seconds.append(perf_counter() - started)

    @property
    def bytes(self) -> int:
        """Of the weights, quantized ones as they are stored."""
        held = 0
        for parameter in self.loaded.pipeline.transformer.parameters():
            inner = getattr(parameter, "tensor_data_names", ())
            tensors = [getattr(parameter, name) for name in inner] or [parameter]
            held += sum(tensor.nbytes for tensor in tensors)
        return held


def inputs(spec: ModelSpec, settings: Settings, loaded: Loaded) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, a timestep and a prompt, drawn from a normal distribution."""
    config, video = loaded.pipeline.transformer.config, settings.video
    shape = latent_shape(
        num_frames=video.num_frames, width=video.width, height=video.height,
        channels=spec.latent_channels, strides=spec.strides,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    size = (1, config.in_channels, shape.frames, shape.height, shape.width)
    place = {"device": loaded.device, "dtype": loaded.pipeline.transformer.dtype}
    latents = torch.randn(size, generator=generator).to(**place)
    text = torch.randn(1, spec.text_length, config.text_dim, generator=generator).to(**place)
    return latents, torch.tensor([TIMESTEP], device=loaded.device), text


def report(ways: Mapping[str, Way]) -> None:
    """A line for each: medians, paired ratios, error, bytes."""
    usual = ways["as it is"]
    known = usual.forward()
    columns = ("", "forward", "faster", "least to most", "error", "weights")
    say("%-16s %10s %9s %18s %9s %10s", *columns)
    for name, way in ways.items():
        ratios = [a / b for a, b in zip(usual.seconds, way.seconds, strict=True)]
        error = ((way.forward() - known).norm() / known.norm()).item()
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        say(
            "%-16s %7.1f ms %8.2fx %18s %9.1e %6.1f MiB", name, 1000 * median(way.seconds),
            median(ratios), spread, error, way.bytes / 2**20,
        )  # fmt: skip


def read(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(prog="benchmarks.forwards", description=__doc__)
    parser.add_argument("--model", default="demo", help="also random:NAME (default: demo)")
    parser.add_argument("--layers", type=int, help="blocks of a random model")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16")
    parser.add_argument("--size", default="96x96", help="WIDTHxHEIGHT (default: 96x96)")
    parser.add_argument("--num-frames", type=int, default=33, help="video frames (default: 33)")
    parser.add_argument("--rounds", type=int, default=20, help="forwards of each (default: 20)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and tell."""
    given = read(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("bench").setLevel(logging.INFO)
    warnings.simplefilter("ignore")
    width, _, height = given.size.partition("x")
    video = {"width": int(width), "height": int(height), "num_frames": given.num_frames}
    ways: dict[str, Way] = {}
    for name, options in WAYS.items():
        machine = {"dtype": given.dtype, "layers": given.layers, **options}
        asked = {"model": given.model, "machine": machine, "video": video}
        settings = resolve([Layer("flag", asked)], Settings).settings
        spec = find_spec(given.model, layers=given.layers)
        loaded = load_pipeline(spec, settings.machine, ["transformer"])
        ways[name] = Way(loaded, inputs(spec, settings, loaded))
        started = perf_counter()
        for _ in range(2):  # the prompt's keys and values, and both graphs of a compiled block
            ways[name].forward()
        say("%s: the first two forwards took %.1f s", name, perf_counter() - started)
    for _ in range(given.rounds):
        for way in ways.values():
            way.time()
    report(ways)
    return 0


if __name__ == "__main__":
    sys.exit(main())
