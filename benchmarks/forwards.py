"""Time a forward of the transformer: plain, compiled, fused and quantized, interleaved.

The prompt's keys and values are cached, as in every step but the first. Prints the speed-up, the
error and the size of the weights of each.
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

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "--compile": {"compile": True},
    "--fuse-qkv": {"fuse_qkv": True},
    "--quantize int8": {"quantize": "int8"},
    "--quantize fp8": {"quantize": "fp8"},
}
TIMESTEP = 500.0

logger = logging.getLogger("bench")


@dataclass
class TimedTransformer:
    """A transformer, its inputs, and the seconds of each forward."""

    loaded: Loaded
    inputs: tuple[Tensor, Tensor, Tensor]
    prompt_kv: PromptKVCache = field(default_factory=PromptKVCache)
    seconds: list[float] = field(default_factory=list)

    @torch.no_grad()
    def forward(self) -> Tensor:
        """Velocity [1, C, F, H, W] in float32."""
        transformer = self.loaded.pipeline.transformer
        with prompt_kv(transformer, self.prompt_kv):
            velocity: Tensor = transformer(*self.inputs, return_dict=False)[0]
        return velocity.float().cpu()  # waits for a GPU

    def time(self) -> None:
        """Time another forward."""
        started = perf_counter()
        self.forward()
        self.seconds.append(perf_counter() - started)

    @property
    def nbytes(self) -> int:
        """Size of the weights, as stored if quantized."""
        total = 0
        for parameter in self.loaded.pipeline.transformer.parameters():
            inner = getattr(parameter, "tensor_data_names", ())
            tensors = [getattr(parameter, name) for name in inner] or [parameter]
            total += sum(tensor.nbytes for tensor in tensors)
        return total


def draw_inputs(
    spec: ModelSpec, settings: Settings, loaded: Loaded
) -> tuple[Tensor, Tensor, Tensor]:
    """Random latents, a timestep and random prompt embeddings."""
    config, video = loaded.pipeline.transformer.config, settings.video
    shape = latent_shape(
        num_frames=video.num_frames, width=video.width, height=video.height,
        channels=spec.latent_channels, strides=spec.strides,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    size = (1, config.in_channels, shape.frames, shape.height, shape.width)
    options = {"device": loaded.device, "dtype": loaded.pipeline.transformer.dtype}
    latents = torch.randn(size, generator=generator).to(**options)
    text = torch.randn(1, spec.text_length, config.text_dim, generator=generator).to(**options)
    return latents, torch.tensor([TIMESTEP], device=loaded.device), text


def report(variants: Mapping[str, TimedTransformer]) -> None:
    """Print a line each: median time, paired speed-ups, relative error, size."""
    plain = variants["plain"]
    reference = plain.forward()
    columns = ("", "forward", "faster", "min to max", "error", "weights")
    logger.info("%-16s %10s %9s %18s %9s %10s", *columns)
    for name, variant in variants.items():
        ratios = [a / b for a, b in zip(plain.seconds, variant.seconds, strict=True)]
        error = ((variant.forward() - reference).norm() / reference.norm()).item()
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        logger.info(
            "%-16s %7.1f ms %8.2fx %18s %9.1e %6.1f MiB", name, 1000 * median(variant.seconds),
            median(ratios), spread, error, variant.nbytes / 2**20,
        )  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.forwards", description=__doc__)
    parser.add_argument("--model", default="demo", help="a model or random:NAME (default: demo)")
    parser.add_argument("--layers", type=int, help="limit a random: model to N blocks")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16")
    parser.add_argument("--size", default="96x96", help="WIDTHxHEIGHT (default: 96x96)")
    parser.add_argument("--num-frames", type=int, default=33, help="video frames (default: 33)")
    parser.add_argument("--rounds", type=int, default=20, help="forwards of each (default: 20)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("bench").setLevel(logging.INFO)
    warnings.simplefilter("ignore")
    width, _, height = args.size.partition("x")
    video = {"width": int(width), "height": int(height), "num_frames": args.num_frames}
    variants: dict[str, TimedTransformer] = {}
    for name, options in VARIANTS.items():
        machine = {"dtype": args.dtype, "layers": args.layers, **options}
        tables = {"model": args.model, "machine": machine, "video": video}
        settings = resolve([Layer("flag", tables)], Settings).settings
        spec = find_spec(args.model, layers=args.layers)
        loaded = load_pipeline(spec, settings.machine, ["transformer"])
        variants[name] = TimedTransformer(loaded, draw_inputs(spec, settings, loaded))
        started = perf_counter()
        for _ in range(2):  # fill the prompt K/V cache, compile both graphs of a block
            variants[name].forward()
        logger.info("%s: the first two forwards took %.1f s", name, perf_counter() - started)
    for _ in range(args.rounds):
        for variant in variants.values():
            variant.time()
    report(variants)
    return 0


if __name__ == "__main__":
    sys.exit(main())
