"""Time `wancli generate` against a plain diffusers script for the same video, on the CPU.

Both run as whole processes in pairs, in alternating order. Exits with 1 if the latents of a pair
are not equal, bit for bit.
"""

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from safetensors.torch import load_file

from wancli.catalog.local import find_spec
from wancli.config.presets import find_preset, layers
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import Settings

PROMPT, SEED = "a red circle moving right on a black background", 1
PLAIN = Path(__file__).with_name("plain_diffusers.py")
WANCLI = ("-c", "from wancli.__main__ import main; main()")

logger = logging.getLogger("bench")


@dataclass(frozen=True)
class Run:
    """A process: wall time, CPU time, and the timings it reports."""

    wall_s: float
    cpu_s: float
    timings: Mapping[str, Any]


def commands(settings: Settings, preset: str, folder: Path) -> tuple[list[str], list[str]]:
    """Commands of plain diffusers and of wancli; both write NAME.safetensors to `folder`."""
    spec = find_spec(settings.model)
    request = settings.model_dump(mode="json") | {"prompt": PROMPT, "seed": SEED}
    request |= {"model": str(spec.folder or spec.repo), "text_length": spec.text_length}
    request_file = folder / "request.json"
    request_file.write_text(json.dumps(request))
    latents = folder / "plain.safetensors"
    plain = [str(PLAIN), str(request_file), str(latents), str(folder / "plain.mp4")]
    wancli = [*WANCLI, "generate", PROMPT, "--seed", str(SEED), "--device", "cpu", "--json", "-q"]
    wancli += ["--preset", preset, "--model", settings.model]
    wancli += ["--steps", str(settings.sampling.steps), "--overwrite"]
    wancli += ["--output", str(folder / "wancli.mp4")]
    wancli += ["--save-latents", str(folder / "wancli.safetensors")]
    return plain, wancli


def run(arguments: Sequence[str]) -> Run:
    """Run Python with `arguments`; the last line of its output is JSON."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), perf_counter()
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, check=True)
    wall, after = perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    output = json.loads(done.stdout.splitlines()[-1])
    return Run(wall, cpu, output.get("timings", output))


def equal_latents(folder: Path) -> bool:
    """Whether both runs wrote the same latents."""
    one, other = (load_file(folder / f"{name}.safetensors") for name in ("plain", "wancli"))
    return bool(one["latents"].equal(other["latents"]))


def report(plain: Sequence[Run], wancli: Sequence[Run]) -> None:
    """Print medians, paired ratios, and the phases of wancli's time."""
    logger.info("%-10s %9s %9s %9s   medians of %d", "", "wall", "CPU", "denoise", len(plain))
    for name, runs in (("diffusers", plain), ("wancli", wancli)):
        wall, cpu = median(r.wall_s for r in runs), median(r.cpu_s for r in runs)
        denoise = median(r.timings["denoise_s"] for r in runs)
        logger.info("%-10s %7.2f s %7.2f s %7.2f s", name, wall, cpu, denoise)
    pairs = list(zip(plain, wancli, strict=True))
    for name, ratios in (
        ("denoise", [b.timings["denoise_s"] / a.timings["denoise_s"] for a, b in pairs]),
        ("wall", [b.wall_s / a.wall_s for a, b in pairs]),
        ("CPU", [b.cpu_s / a.cpu_s for a, b in pairs]),
    ):
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        logger.info("wancli / diffusers, %-8s %.3f   (%s)", name, median(ratios), spread)
    parts = ("load_s", "encode_prompt_s", "denoise_s", "decode_s", "save_s")
    phases = {part.removesuffix("_s"): median(r.timings[part] for r in wancli) for part in parts}
    phases["start and imports"] = median(r.wall_s - r.timings["total_s"] for r in wancli)
    logger.info("wancli's time: %s", ", ".join(f"{name} {s:.2f} s" for name, s in phases.items()))


def main() -> int:
    """Compare; returns 1 if latents differ."""
    parser = argparse.ArgumentParser(prog="benchmarks/generate.py", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument("--preset", default="demo", help="preset of both (default: demo)")
    parser.add_argument("--model", help="another model or folder")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the preset's)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    flags: dict[str, Any] = {"model": args.model} if args.model else {}
    if args.steps:
        flags["sampling"] = {"steps": args.steps}
    stack = [*layers(find_preset(args.preset)), Layer("flag", flags)]
    settings = resolve(stack, Settings).settings
    if settings.sampling.scheduler != "unipc":
        parser.error("the plain script samples with unipc; choose a preset with unipc")
    runs: dict[str, list[Run]] = {"plain": [], "wancli": []}
    equal = 0
    with tempfile.TemporaryDirectory() as folder:
        both = dict(zip(runs, commands(settings, args.preset, Path(folder)), strict=True))
        for pair in range(args.pairs + 1):
            for name in sorted(both, reverse=pair % 2 == 0):
                runs[name].append(run(both[name]))
                label = f"pair {pair} of {args.pairs}" if pair else "warm-up"
                logger.info("%s: %s %.2f s", label, name, runs[name][-1].wall_s)
            equal += pair > 0 and equal_latents(Path(folder))
    report(runs["plain"][1:], runs["wancli"][1:])
    logger.info("latents equal in %d of %d pairs", equal, args.pairs)
    return 0 if equal == args.pairs else 1


if __name__ == "__main__":
    sys.exit(main())
