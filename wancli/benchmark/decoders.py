"""A benchmark of ways to decode: the same latents, and frames against the VAE's own decoder."""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from wancli.benchmark.cases import BenchInputs, Case, Variant
from wancli.benchmark.session import BASELINE, BenchRequest
from wancli.catalog.decoder_files import add_vae_decoder, check_decoder, find_tiny_decoder
from wancli.catalog.geometry import TILE
from wancli.catalog.local import check_files
from wancli.catalog.specs import ModelSpec
from wancli.catalog.tiny_decoder import DECODER, EXACT, TINY
from wancli.config.layers import find_model
from wancli.config.resolve import Layer, resolve
from wancli.config.seeds import parse_seeds
from wancli.config.settings import Machine, Settings
from wancli.cost.capacity import check_capacity, generation_estimator
from wancli.errors import PlanError
from wancli.models.warm import quiet_imports
from wancli.planning.input_files import check_input_files
from wancli.planning.inputs import choose_task
from wancli.planning.output_files import bench_folder
from wancli.planning.plan import Plan, check_unused_settings, make_plan
from wancli.records.progress import Observer, Phase, Report, report_warnings
from wancli.records.record import write_json
from wancli.utils.files import whole_folder
from wancli.utils.outputs import OutputSet
from wancli.video.compare import compare_videos, psnr

if TYPE_CHECKING:
    from wancli.benchmark.measure import RenderedRun

SCHEMA = "wancli.bench-decoders/1"
# The VAE's own decoder, as diffusers runs it; other ways change some of these settings.
_EXACT = {"vae_decoder": EXACT, "vae_exact": True, "vae_dtype": "float32", "vae_tiling": False}
_FAST = {"vae_exact": False, "vae_dtype": "float32"}
_TINY = {"vae_exact": None, "vae_decoder": TINY}
_TIMES = 3  # decodings of each video


@dataclass(frozen=True)
class DecoderVariant:
    """A way to decode, and the settings that make it."""

    name: str
    machine: Machine
    spec: ModelSpec  # with its decoder


@dataclass(frozen=True)
class DecoderResult:
    """Measurements of one way to decode, over all videos."""

    name: str
    settings: Mapping[str, Any]
    decode_s: float  # median over videos, of the fastest of each
    speed_up: float  # the exact decoder's time over its own
    peak_gib: float | None
    ssim: float | None = None  # mean; these are None for the exact decoder
    ssim_worst: float | None = None  # over all video frames
    psnr_db: float | None = None  # of the mean squared error; None if nothing differs


class DecoderBench:
    """Decodes the latents of each prompt and seed in every way."""

    def __init__(self, request: BenchRequest, layers: list[Layer]) -> None:
        """Raises WancliError for what cannot be measured."""
        if request.variants:
            raise PlanError(
                "`decoders` measures every way to decode; it has no `variant`.",
                hint="drop `variant`; `vae_decoder FILE` measures that decoder, too",
            )
        resolved = resolve(layers, Settings)
        self._inputs, self.spec = request.inputs, find_model(resolved)
        task = choose_task(self.spec, request.inputs, request.task)
        if task.segmented:
            raise PlanError(
                f"`decoders` has no {task.name}, whose pipeline decodes itself.",
                hint="another `task`",
            )
        check_unused_settings(resolved, task.name)
        self._task, self.settings = task.name, _with_vae(resolved.settings, _EXACT)
        decoder, plain = resolved.settings.machine.vae_decoder, _without_decoder(self.spec)
        self.variants = list(_variants(self.settings, plain, decoder))
        for variant in self.variants:
            check_decoder(variant.spec)
            self._plan(self.settings.model_copy(update={"machine": variant.machine}))
        self.exact = self.variants[0]
        seeds = parse_seeds(request.seeds or "0", None)
        self.cases = [Case(prompt, seed) for prompt in request.prompts for seed in seeds]

    def run(
        self, folder: Path, observer: Observer, *, overwrite: bool, force: bool = False
    ) -> dict[str, Any]:
        """Measure, and write `bench.json` into `folder`; returns its content."""
        spec, check = self.exact.spec, generation_estimator(self.exact.spec, self._plan)
        capacity = check_capacity(self.settings, spec, check, force=force)
        capacity.check()
        check_files(spec)
        cropping = check_input_files(self._inputs, self.settings.video, spec.strides)
        self.settings = capacity.with_offload(self.settings)
        outputs = OutputSet(overwrite=overwrite)
        outputs.add(bench_folder(folder, overwrite=overwrite))
        with outputs.locked(), whole_folder(
            folder, hint="another `output`", overwrite=overwrite
        ) as part, observer.progress() as report:  # fmt: skip
            report_warnings(cropping, observer)
            with quiet_imports(report):
                from wancli.benchmark import measure
            baseline = Variant(BASELINE, "", self.settings, self._plan(self.settings), lossy=False)
            inputs = BenchInputs(self._inputs)
            measurer = measure.Measurer(spec, baseline, part, report, inputs)
            rendered = [measurer.baseline_run(case) for case in self.cases]
            machine = measurer.machine
            del measurer  # and its weights
            results = self._measure(rendered, report)
            content = self._as_json(results, machine)
            write_json(content, part / "bench.json")
        return content

    def _plan(self, settings: Settings) -> Plan:
        return make_plan(settings, self.spec, self._inputs, task=self._task)

    def _measure(self, rendered: "Sequence[RenderedRun]", report: Report) -> list[DecoderResult]:
        results: list[DecoderResult] = []
        for variant in self.variants:
            report(Phase(f"decode: {variant.name}"))
            result = _measured(variant, rendered)
            exact = results[0].decode_s if results else result.decode_s
            results.append(replace(result, speed_up=exact / result.decode_s))
        return results

    def _as_json(
        self, results: Sequence[DecoderResult], machine: Mapping[str, str]
    ) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["wancli", *sys.argv[1:]]),
            "model": self.spec.name,
            "machine": machine,
            "video": self.settings.video.model_dump(),
            "videos": len(self.cases),
            "decoders": [asdict(result) for result in results],
            "runs": [],  # it keeps no videos
        }


def _without_decoder(spec: ModelSpec) -> ModelSpec:
    """The model with its VAE's own decoder."""
    files = tuple(file for file in spec.files if file.part != DECODER)
    return replace(spec, files=files, tiny_decoder=None)


def _variants(settings: Settings, spec: ModelSpec, decoder: str) -> Iterator[DecoderVariant]:
    """Ways to decode that the model and the size of the video have, the exact one first."""
    narrow = {"vae_dtype": "bfloat16"}
    ways: dict[str, Mapping[str, Any]] = {
        EXACT: {},
        "fast": _FAST,
        "bfloat16": narrow,
        "fast bfloat16": {**_FAST, **narrow},
    }
    video = settings.video
    if max(video.width, video.height) > TILE:
        ways["tiled"] = {"vae_tiling": True}
    if spec.random or find_tiny_decoder(spec):
        ways |= {TINY: _TINY, "tiny bfloat16": {**_TINY, **narrow}}
    if decoder not in (EXACT, TINY):
        ways[Path(decoder).name] = {**_TINY, "vae_decoder": decoder}
    for name, changes in ways.items():
        machine = _with_vae(settings, changes).machine
        yield DecoderVariant(name, machine, add_vae_decoder(spec, machine.vae_decoder))


def _with_vae(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    machine = settings.machine.model_copy(update=dict(changes))
    return settings.model_copy(update={"machine": machine})


def _measured(variant: DecoderVariant, rendered: "Sequence[RenderedRun]") -> DecoderResult:
    """Decode every video a few times. The first decodings of all warm up."""
    from wancli.generation.denoise import decode
    from wancli.models.load import load_vae
    from wancli.models.memory import peak_memory, reset_peak_memory
    from wancli.models.timer import Timer

    vae, device = load_vae(variant.spec, variant.machine)
    decode(vae, rendered[0].latents)
    reset_peak_memory(device)
    seconds, qualities = [], []
    for run in rendered:
        clock = Timer(device)
        for _ in range(_TIMES):
            frames = decode(vae, run.latents)
            clock.mark("decode")
        seconds.append(min(clock.ms("decode")) / 1000)
        qualities.append(compare_videos(run.frames, frames))
    peak = max(peak_memory(device).values(), default=None)
    changed = {name: getattr(variant.machine, name) for name in _EXACT}
    result = DecoderResult(variant.name, changed, median(seconds), 1.0, peak)
    if variant.name == EXACT:
        return result
    return replace(
        result,
        ssim=fmean(quality.ssim.mean for quality in qualities),
        ssim_worst=min(quality.ssim.worst for quality in qualities),
        psnr_db=psnr(fmean(quality.mse.mean for quality in qualities)),
    )
