"""A benchmark from request to report: variants are checked, tuned, measured and judged."""

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from wancli.benchmark.cases import (
    Arm,
    Bench,
    BenchInputs,
    Case,
    Run,
    Variant,
    noise_floor,
    summarize,
)
from wancli.catalog.local import check_files
from wancli.catalog.vocabulary import prompt_warnings
from wancli.config.layers import find_model
from wancli.config.presets import preset_file
from wancli.config.resolve import Layer, resolve
from wancli.config.seeds import parse_seeds
from wancli.config.settings import Settings
from wancli.config.tuned import save_tuned, tuned_for
from wancli.cost.capacity import check_capacity, generation_estimator
from wancli.errors import PlanError, QualityError, UsageError
from wancli.models.warm import quiet_imports
from wancli.planning.input_files import check_input_files, inputs_json
from wancli.planning.inputs import NO_INPUTS, InputFiles, choose_task
from wancli.planning.listed_steps import LISTED
from wancli.planning.offload import OFFLOADS
from wancli.planning.output_files import bench_folder
from wancli.planning.plan import Plan, check_unused_settings, make_plan
from wancli.planning.rules_machine import check_gguf_package, check_quantizer
from wancli.records.progress import Observer, report_warnings
from wancli.records.record import write_json
from wancli.utils.files import whole_folder
from wancli.utils.outputs import OutputSet
from wancli.video.ffmpeg import choose_encoding

if TYPE_CHECKING:
    from wancli.benchmark.measure import Measurer
    from wancli.benchmark.tune import TuningResult

BASELINE = "baseline"
SHARED = ("model", "machine", "video", "output")  # the same in all variants
SPEEDUPS = ("quantize", "fuse_qkv", "compile", "compile_mode", "attention_backend", "lora")
# Keys of settings that variants may share without using them.
MAY_BE_UNUSED = ("step_cache.", *(f"sampling.{name}" for name in LISTED))


@dataclass(frozen=True)
class Goals:
    """Thresholds for the exit code, and the target of tuning."""

    min_ssim: float | None = None  # of any video frame of a lossy variant
    max_ratio: float | None = None  # of a variant's denoising time to the baseline's
    target_ssim: float | None = None  # of any video frame, for tuning; None: no tuning
    preset: str | None = None  # name of the preset to save after tuning


@dataclass(frozen=True)
class VariantFlags:
    """A variant: its name, its flags as typed, and their settings.

    Those of its `preset` lie below the flags of the whole benchmark, as in generate.
    """

    name: str
    flags: str
    layers: Sequence[Layer]
    preset: Sequence[Layer] = ()


@dataclass(frozen=True)
class BenchRequest:
    """Prompts, seeds as text, and variants; the input files are those of every video."""

    prompts: Sequence[str]
    seeds: str | None
    variants: Sequence[VariantFlags]
    flag: Callable[[str], str]  # spells a setting as the flag of a tuned variant
    inputs: InputFiles = NO_INPUTS
    task: str | None = None


class BenchSession:
    """A benchmark: resolves its variants, then measures them and writes the report."""

    def __init__(self, request: BenchRequest, layers: list[Layer], goals: Goals) -> None:
        """The last of the `layers` has the flags of the whole benchmark."""
        self.goals, self._layers, self._flag = goals, layers, request.flag
        resolved = resolve(layers, Settings)
        self.base, self.spec = resolved.settings, find_model(resolved)
        self._inputs = request.inputs
        self._task = choose_task(self.spec, request.inputs, request.task).name
        self.baseline = self._variant(VariantFlags(BASELINE, "", []))
        if not request.variants:
            raise UsageError("no variant to compare.", hint='`variant "fast: --use-cachedit"`')
        self.variants = [self._variant(entry) for entry in request.variants]
        if goals.target_ssim is not None:
            _check_tunable(self.variants)
        seeds = parse_seeds(request.seeds or "0", None)
        self.cases = [Case(prompt, seed) for prompt in request.prompts for seed in seeds]

    def run(
        self, folder: Path, observer: Observer, *, overwrite: bool, force: bool = False
    ) -> tuple[Bench, Path]:
        """Measure every variant; return the results and the path of the report in `folder`.

        `force` skips the memory check. Raises WancliError.
        """
        self._choose_offload(force=force)
        check_files(self.spec)
        check_gguf_package(self.spec)
        for variant in self.variants:
            check_quantizer(variant.settings.machine)
        video = self.base.video
        choose_encoding(self.base.output, (video.width, video.height))
        cropping = check_input_files(self._inputs, self.base.video, self.spec.strides)
        inputs = BenchInputs(self._inputs, inputs_json(self._inputs, self.baseline.plan))
        if self.goals.preset:
            preset_file(self.goals.preset, hint="another `save_preset`")
        outputs = OutputSet(overwrite=overwrite, reads=[*chain(*self._inputs.named().values())])
        outputs.add(bench_folder(folder, overwrite=overwrite))
        prompts = [case.prompt for case in self.cases]
        with outputs.locked():
            words = prompt_warnings(self.spec, prompts)
            report_warnings((*words, *cropping), observer)
            return self._write(folder, inputs, observer, overwrite=overwrite)

    def _write(
        self, folder: Path, inputs: BenchInputs, observer: Observer, *, overwrite: bool
    ) -> tuple[Bench, Path]:
        """Measure, and write `folder` whole or not at all."""
        hint = "another `output`"
        with (
            whole_folder(folder, hint=hint, overwrite=overwrite) as part,
            observer.progress() as report,
        ):
            with quiet_imports(report):
                from wancli.benchmark.measure import Measurer
                from wancli.benchmark.report import write_report
            (part / "videos").mkdir()
            measurer = Measurer(self.spec, self.baseline, part, report, inputs)
            variants, chosen = self.variants, None
            if self.goals.target_ssim is not None:
                variants, chosen = self._tune(measurer, self.goals.target_ssim, observer)
            bench = self._measure(measurer, [self.baseline, *variants], part)
            bench = replace(bench, chosen=chosen)
            return bench, folder / write_report(bench, part).name

    def _choose_offload(self, *, force: bool) -> None:
        """Choose an offload mode that every variant supports and fits in. Raises CapacityError."""
        variants = [self.baseline, *self.variants]
        offloads = [n for n in OFFLOADS if all(n in v.plan.offloads for v in variants)]
        estimated = generation_estimator(self.spec, self._plan, offloads)
        capacities = [
            check_capacity(v.settings, self.spec, estimated, force=force) for v in variants
        ]
        for capacity in capacities:
            capacity.check()
        chosen = max(capacities, key=lambda capacity: list(OFFLOADS).index(capacity.offload))
        self.base = chosen.with_offload(self.base)
        self.baseline, *self.variants = (
            replace(v, settings=chosen.with_offload(v.settings)) for v in variants
        )

    def _variant(self, entry: VariantFlags) -> Variant:
        name, flags, own = entry.name, entry.flags, entry.layers
        *below, flags_of_all = self._layers
        resolved = resolve([*below, *entry.preset, flags_of_all, *own], Settings)
        own_keys = {
            f"{table}.{key}"
            for layer in own
            if layer.source == "flag"
            for table in ("step_cache", "sampling")
            for key in layer.tables.get(table, {})
        }
        # Caches and timesteps shared by all variants may be unused in some of them.
        others = {key for key in resolved.sources if not key.startswith(MAY_BE_UNUSED)}
        sources = {key: resolved.sources[key] for key in others | own_keys}
        check_unused_settings(replace(resolved, sources=sources), self._task)
        settings = resolved.settings
        speedups = {name: getattr(self.base.machine, name) for name in SPEEDUPS}
        machine = settings.machine.model_copy(update=speedups)
        for part in SHARED:
            value = machine if part == "machine" else getattr(settings, part)
            if value != getattr(self.base, part):
                raise PlanError(
                    f"variant '{name}' changes the {part}: all variants share it.",
                    hint="pass that flag to wancli bench itself",
                )
        if flags and settings == self.base:
            raise PlanError(
                f"variant '{name}' is the baseline.", hint='`variant "fast: --use-cachedit"`'
            )
        prompt_kv, base_kv = settings.prompt_kv, self.base.prompt_kv
        exact = settings.model_copy(update={"prompt_kv": base_kv}) == self.base
        exact &= prompt_kv.kv_align == base_kv.kv_align  # alignment rounds differently
        exact &= not settings.machine.compile  # so do compiled graphs with and without K/V
        return Variant(name, flags, settings, self._plan(settings), lossy=not exact)

    def _plan(self, settings: Settings) -> Plan:
        return make_plan(settings, self.spec, self._inputs, task=self._task)

    def _tune(
        self, measurer: "Measurer", target: float, observer: Observer
    ) -> tuple[list[Variant], str | None]:
        """Variants at their best thresholds, and the name of the fastest of them."""
        from wancli.benchmark.tune import tune

        tuned: dict[str, TuningResult] = {}
        variants = []
        for variant in self.variants:
            with_threshold = partial(_with_threshold, variant, self._flag)
            tuned[variant.name] = tune(measurer, with_threshold, self.cases, target=target)
            if best := tuned[variant.name].best:
                variants.append(with_threshold(best.threshold))
        self._report_tuned(tuned, observer)
        good = {name: result.best for name, result in tuned.items() if result.best}
        if not good:
            raise QualityError(
                f"no threshold keeps every video frame at SSIM {target:g} or over.",
                hint="a lower `target_ssim`, more `steps`, or `taylorseer`",
            )
        fastest = min(good, key=lambda name: good[name].blocks)
        settings = next(v for v in variants if v.name == fastest).settings
        key = tuned_for(settings, measurer.machine)
        path = save_tuned(self.spec, settings, key, name=self.goals.preset)
        observer.note(f"saved: `cachedit_preset {path.stem}`  ({path})")
        return variants, fastest

    def _measure(self, measurer: "Measurer", variants: Sequence[Variant], folder: Path) -> Bench:
        """Measure every case, and write `bench.json` after each."""
        runs: list[Run] = []
        for measured in measurer.measure(variants, self.cases):
            runs += measured
            bench = self._bench(measurer, variants, runs)
            write_json(bench.as_json(), folder / "bench.json", overwrite=True)
        bench = replace(bench, floor=noise_floor(measurer.compare_seeds(self.cases)))
        write_json(bench.as_json(), folder / "bench.json", overwrite=True)
        return bench

    def _bench(self, measurer: "Measurer", variants: Sequence[Variant], runs: list[Run]) -> Bench:
        baseline = [run for run in runs if run.arm == BASELINE]
        arms = [
            Arm(
                v.name,
                v.flags,
                v.lossy,
                summarize([r for r in runs if r.arm == v.name], baseline),
                v.caches,
            )
            for v in variants
        ]
        sampling, video = self.base.sampling, self.base.video
        return Bench(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=shlex.join(["wancli", *sys.argv[1:]]),
            model=self.spec.name,
            machine=measurer.machine,
            settings={**sampling.model_dump(), **video.model_dump()},
            arms=tuple(arms),
            runs=tuple(runs),
            target_ssim=self.goals.target_ssim or self.goals.min_ssim,
        )

    def _report_tuned(self, tuned: "dict[str, TuningResult]", observer: Observer) -> None:
        for name, result in tuned.items():
            for point in result.points:
                mark = " <" if point == result.best else ""
                observer.note(
                    f"{name}: threshold {point.threshold:<9.4g} blocks {point.blocks:6.1%}  "
                    f"worst SSIM {point.ssim:.4f}{mark}"
                )
            if result.points[-1].ssim >= (self.goals.target_ssim or 0):
                observer.note(
                    f"{name}: no threshold was too high; `cachedit_max_warmup_steps` and "
                    "`cachedit_max_continuous` limit its reuse"
                )

    def judge(self, bench: Bench) -> None:
        """Raise QualityError if a variant misses a goal, or an exact one is not exact."""
        min_ssim, max_ratio = self.goals.min_ssim, self.goals.max_ratio
        missed = []
        for arm in bench.arms[1:]:
            worst, ratio = arm.summary.ssim_worst, arm.time_ratio
            if not arm.lossy and not arm.summary.equal_latents:
                missed.append(f"{arm.name} should be exact, but its latents differ")
            if min_ssim is not None and worst is not None and worst < min_ssim:
                missed.append(f"{arm.name}: a video frame has SSIM {worst:.4f}, under {min_ssim:g}")
            if max_ratio is not None and ratio > max_ratio:
                missed.append(
                    f"{arm.name}: denoising takes {ratio:.2f} of the time, over {max_ratio:g}"
                )
        if missed:
            raise QualityError(
                f"{'; '.join(missed)}.", hint="other thresholds: wancli bench --tune finds them"
            )


def _with_threshold(variant: Variant, flag: Callable[[str], str], threshold: float) -> Variant:
    """The variant with another threshold of its step cache."""
    cache = variant.settings.step_cache
    is_cachedit = cache.step_cache == "cachedit"
    name = "cachedit_residual_threshold" if is_cachedit else "step_cache_threshold"
    cache = cache.model_copy(update={name: threshold})
    settings = variant.settings.model_copy(update={"step_cache": cache})
    return replace(variant, settings=settings, flags=f"{variant.flags} {flag(name)} {threshold:g}")


def _check_tunable(variants: Sequence[Variant]) -> None:
    for variant in variants:
        if variant.settings.step_cache.step_cache == "none":
            raise PlanError(
                f"variant '{variant.name}' has no threshold to tune.",
                hint=f'`variant "{variant.name}: {variant.flags} --use-cachedit"`',
            )
