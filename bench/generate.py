"""Time `wancli generate` against a plain diffusers script that makes the same video.

Both run as whole processes, in turns, and take the lead in turns. Exits 1 when the latents of a pair
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

from wancli.presets import find_preset, layers
from wancli.settings import Layer, Settings, resolve
from wancli.specs import find_spec

PROMPT, SEED = "a red circle moving right on a black background", 1
PLAIN = Path(__file__).with_name("plain_diffusers.py")
WANCLI = "from wancli.cli.app import main; main()"

say = logging.getLogger("bench").info


@dataclass(frozen=True)
class Run:
    """One process: seconds by the wall, seconds of CPU, its own timings, and its latents."""

    wall_s: float
    cpu_s: float
    timings: Mapping[str, Any]
    latents: Path


@dataclass(frozen=True)
class Case:
    """One request, and a folder for what comes of it."""

    settings: Settings
    preset: str
    folder: Path

    def plain(self) -> Run:
        """Through diffusers alone."""
        spec = find_spec(self.settings.model)
        request = self.folder / "request.json"
        told = {"prompt": PROMPT, "seed": SEED, "text_length": spec.text_length}
        request.write_text(
            json.dumps(
                self.settings.model_dump(mode="json")
                | told
                | {"model": str(spec.folder or spec.repo)}
            )
        )
        latents, video = self.folder / "plain.safetensors", self.folder / "plain.mp4"
        *times, told = run([sys.executable, str(PLAIN), str(request), str(latents), str(video)])
        return Run(*times, told, latents)

    def wancli(self) -> Run:
        """Through wancli."""
        latents = self.folder / "wancli.safetensors"
        *times, told = run(
            [
                sys.executable,
                "-c",
                WANCLI,
                "generate",
                PROMPT,
                "--seed",
                str(SEED),
                "--device",
                "cpu",
            ]
            + ["--preset", self.preset, "--model", self.settings.model]
            + ["--steps", str(self.settings.sampling.steps), "--json", "--quiet", "--overwrite"]
            + ["--output", str(self.folder / "wancli.mp4"), "--save-latents", str(latents)]
        )
        return Run(*times, told["timings"], latents)


def run(command: Sequence[str]) -> tuple[float, float, dict[str, Any]]:
    """Wall seconds and CPU seconds of a process, and the JSON on its last line."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    wall, after = perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, json.loads(done.stdout.splitlines()[-1])


def equal(one: Run, other: Run) -> bool:
    """Whether both made the same latents."""
    return bool(load_file(one.latents)["latents"].equal(load_file(other.latents)["latents"]))


def report(plain: Sequence[Run], wancli: Sequence[Run]) -> None:
    """Print medians by arm, ratios by pair, and where wancli's time goes."""
    say("%-10s %9s %9s %9s   medians of %d", "", "wall", "CPU", "denoise", len(plain))
    for name, runs in (("diffusers", plain), ("wancli", wancli)):
        walls, cpus = [r.wall_s for r in runs], [r.cpu_s for r in runs]
        denoise = median(r.timings["denoise_s"] for r in runs)
        say("%-10s %7.2f s %7.2f s %7.2f s", name, median(walls), median(cpus), denoise)
    pairs = list(zip(plain, wancli, strict=True))
    for name, ratios in (
        ("denoise", [b.timings["denoise_s"] / a.timings["denoise_s"] for a, b in pairs]),
        ("wall", [b.wall_s / a.wall_s for a, b in pairs]),
        ("CPU", [b.cpu_s / a.cpu_s for a, b in pairs]),
    ):
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        say("wancli / diffusers, %-8s %.3f   (%s)", name, median(ratios), spread)
    parts = ("load_s", "encode_prompt_s", "denoise_s", "decode_s", "save_s")
    spent = {p.removesuffix("_s"): median(r.timings[p] for r in wancli) for p in parts}
    spent["start and imports"] = median(r.wall_s - r.timings["total_s"] for r in wancli)
    say("wancli's time: %s", ", ".join(f"{name} {s:.2f} s" for name, s in spent.items()))


def main() -> int:
    """Compare; 1 when latents differ."""
    parser = argparse.ArgumentParser(prog="bench/generate.py", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument("--preset", default="demo", help="preset of both (default: demo)")
    parser.add_argument("--model", help="another model, or its folder")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the preset's)")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    flags: dict[str, Any] = {"model": given.model} if given.model else {}
    if given.steps:
        flags["sampling"] = {"steps": given.steps}
    settings = resolve([*layers(find_preset(given.preset)), Layer("flag", flags)]).settings
    if settings.sampling.scheduler != "unipc":
        parser.error("the plain script uses unipc; choose a preset that does")
    with tempfile.TemporaryDirectory() as folder:
        case = Case(settings, given.preset, Path(folder))
        say("warming up: one run of each")
        case.plain(), case.wancli()
        plain, wancli, same = [], [], 0
        for pair in range(given.pairs):
            first, second = (case.plain, case.wancli)[:: 1 if pair % 2 == 0 else -1]
            runs = (first(), second())[:: 1 if pair % 2 == 0 else -1]
            plain.append(runs[0])
            wancli.append(runs[1])
            same += equal(*runs)
            walls = [f"{run.wall_s:.2f} s" for run in runs]
            say("pair %d of %d: diffusers %s, wancli %s", pair + 1, given.pairs, *walls)
    report(plain, wancli)
    say("latents equal in %d of %d pairs", same, given.pairs)
    return 0 if same == given.pairs else 1


if __name__ == "__main__":
    sys.exit(main())
