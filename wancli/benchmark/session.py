"""From what was asked to a bench: variants checked, measured, shown, saved, judged."""

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from wancli.benchmark.cases import Arm, Bench, BenchInputs, Case, Run, Variant, floor_of, summarize
from wancli.catalog.local import check_files, find_spec
from wancli.catalog.vocabulary import vocabulary_warnings
from wancli.config.presets import preset_file
from wancli.config.resolve import Layer, flag, resolve
from wancli.config.seeds import parse_seeds
from wancli.config.settings import Settings
from wancli.config.tuned import save_tuned, tuned_for
from wancli.cost.capacity import check_capacity, generation_estimator
from wancli.errors import PlanError, QualityError, UsageError
from wancli.planning.input_files import check_input_files, inputs_json
from wancli.planning.inputs import NO_INPUTS, InputFiles, choose_task
from wancli.planning.offload import OFFLOADS
from wancli.planning.output_files import bench_folder
from wancli.planning.plan import Plan, check_unused_settings, make_plan
from wancli.records.progress import Observer, say_warnings
from wancli.records.record import write_json
from wancli.utils.files import whole_folder
from wancli.utils.outputs import OutputSet
from wancli.video.ffmpeg import Encoding, check_encoder

if TYPE_CHECKING:
    from wancli.benchmark.measure import Measurer
    from wancli.benchmark.tune import Tuned

BASELINE = "baseline"
SHARED = ("model", "machine", "video", "output")  # by all variants: one loaded model, one size


@dataclass(frozen=True)
class Goals:
    """Thresholds for the exit code, and the target of tuning."""

    least_ssim: float | None = None  # of any video frame of a lossy variant
    most_ratio: float | None = None  # of a variant's denoising time to the baseline's
    tune_for: float | None = None  # least SSIM that --tune aims at
    preset: str | None = None  # name to save what it found under


@dataclass(frozen=True)
class VariantFlags:
    """A variant: its name, its flags as typed, and the settings they say."""

    name: str
    flags: str
    layers: Sequence[Layer]


@dataclass(frozen=True)
class BenchRequest:
    """Prompts, seeds as text, and variants. Files go with all of them."""

    prompts: Sequence[str]
    seeds: str | None
    variants: Sequence[VariantFlags]
    inputs: InputFiles = NO_INPUTS
    task: str | None = None


class BenchSession:
    """One bench on its way from a request to a report."""

    def __init__(self, asked: BenchRequest, layers: list[Layer], goals: Goals) -> None:
        self.goals, self._layers = goals, layers
        self.base = resolve(layers, Settings).settings
        self.spec = find_spec(self.base.model, layers=self.base.machine.layers)
        self._inputs = asked.inputs
        self._task = choose_task(self.spec, asked.inputs, asked.task).name
        self.baseline = self._variant(VariantFlags(BASELINE, "", []))
        if not asked.variants:
            raise UsageError("no variant is given.", hint='--variant "fast: --use-cachedit"')
        self.variants = [self._variant(entry) for entry in asked.variants]
        if goals.tune_for is not None:
            _check_tunable(self.variants)
        seeds = parse_seeds(asked.seeds or "0", None)
        self.cases = [Case(prompt, seed) for prompt in asked.prompts for seed in seeds]

    def run(
        self, folder: Path, observer: Observer, *, overwrite: bool, force: bool = False
    ) -> tuple[Bench, Path]:
        """Measure everything, `force` what does not fit; the bench, and its report in `folder`.

        Raises WancliError.
        """
        self._settle(force=force)
        check_files(self.spec)
        check_encoder(Encoding.of(self.base.output))
        check_input_files(self._inputs, self.base.video)
        given = BenchInputs(self._inputs, inputs_json(self._inputs, self.baseline.plan))
        if self.goals.preset:
            preset_file(self.goals.preset, hint="another --save-preset")
        outputs = OutputSet(overwrite=overwrite, reads=chain(*self._inputs.named().values()))
        outputs.add(bench_folder(folder, overwrite=overwrite))
        prompts = [case.prompt for case in self.cases]
        with outputs.locked():
            say_warnings(vocabulary_warnings(self.spec, prompts), observer)
            return self._write(folder, given, observer, overwrite=overwrite)

    def _write(
        self, folder: Path, given: BenchInputs, observer: Observer, *, overwrite: bool
    ) -> tuple[Bench, Path]:
        """The bench, and its page: in `folder` once it is whole."""
        from wancli.benchmark.measure import Measurer
        from wancli.benchmark.report import write_report

        hint = "another --output"
        with (
            whole_folder(folder, hint=hint, overwrite=overwrite) as part,
            observer.progress() as report,
        ):
            (part / "videos").mkdir()
            measurer = Measurer(self.spec, self.baseline, part, report, given)
            variants, chosen = self.variants, None
            if self.goals.tune_for is not None:
                variants, chosen = self._tune(measurer, self.goals.tune_for, observer)
            bench = self._measure(measurer, [self.baseline, *variants], part)
            bench = replace(bench, chosen=chosen)
            return bench, folder / write_report(bench, part).name

    def _settle(self, *, force: bool) -> None:
        """Choose an offload that every variant goes with and fits under. Raises CapacityError."""
        variants = [self.baseline, *self.variants]
        offloads = [n for n in OFFLOADS if all(n in v.plan.offloads for v in variants)]
        estimated = generation_estimator(self.spec, self._plan, offloads)
        taken = [check_capacity(v.settings, self.spec, estimated, force=force) for v in variants]
        for each in taken:
            each.check()
        most = max(taken, key=lambda each: list(OFFLOADS).index(each.offload))
        self.base = most.with_offload(self.base)
        self.baseline, *self.variants = (
            replace(v, settings=most.with_offload(v.settings)) for v in variants
        )

    def _variant(self, entry: VariantFlags) -> Variant:
        name, flags, own = entry.name, entry.flags, entry.layers
        resolved = resolve([*self._layers, *own], Settings)
        said_by_it = (la.tables.get("step_cache", {}) for la in own if la.source == "flag")
        cached = {f"step_cache.{key}" for table in said_by_it for key in table}
        # The bench's own flags of step caches may be for other variants.
        shared = {key for key in resolved.sources if not key.startswith("step_cache.")}
        said = {key: resolved.sources[key] for key in shared | cached}
        check_unused_settings(replace(resolved, sources=said), self._task)
        settings = resolved.settings
        for part in SHARED:
            if getattr(settings, part) != getattr(self.base, part):
                raise PlanError(
                    f"variant '{name}' changes the {part}: all variants share it.",
                    hint="give that flag to wancli bench itself",
                )
        if flags and settings == self.base:
            raise PlanError(
                f"variant '{name}' is the baseline.", hint='--variant "fast: --use-cachedit"'
            )
        chosen, usual = settings.prompt_kv, self.base.prompt_kv
        exact = settings.model_copy(update={"prompt_kv": usual}) == self.base
        exact &= chosen.kv_align == usual.kv_align  # which is exact but for rounding
        exact &= not settings.machine.compile  # as is a graph with K/V beside one without
        return Variant(name, flags, settings, self._plan(settings), lossy=not exact)

    def _plan(self, settings: Settings) -> Plan:
        return make_plan(settings, self.spec, self._inputs, task=self._task)

    def _tune(
        self, measurer: "Measurer", target: float, observer: Observer
    ) -> tuple[list[Variant], str | None]:
        """The variants at the thresholds that were found, and the name of the best of them."""
        from wancli.benchmark.tune import tune

        found: dict[str, Tuned] = {}
        variants = []
        for variant in self.variants:
            tuned = tune(measurer, _thresholds(variant), self.cases, target=target)
            found[variant.name] = tuned
            if tuned.best:
                variants.append(_thresholds(variant)(tuned.best.threshold))
        self._say_tuned(found, observer)
        good = {name: tuned.best for name, tuned in found.items() if tuned.best}
        if not good:
            raise QualityError(
                f"no threshold keeps every video frame at SSIM {target:g} or over.",
                hint="a lower --target-ssim, more --steps, or --taylorseer",
            )
        best = min(good, key=lambda name: good[name].blocks)
        settings = next(v for v in variants if v.name == best).settings
        key = tuned_for(settings, measurer.machine)
        path = save_tuned(self.spec, settings, key, name=self.goals.preset)
        observer.say(f"saved: --cachedit-preset {path.stem}  ({path})")
        return variants, best

    def _measure(self, measurer: "Measurer", variants: Sequence[Variant], folder: Path) -> Bench:
        """Every case in every variant; what is done is written after each."""
        runs: list[Run] = []
        for made in measurer.measure(variants, self.cases):
            runs += made
            bench = self._bench(measurer, variants, runs)
            write_json(bench.as_json(), folder / "bench.json", overwrite=True)
        bench = replace(bench, floor=floor_of(measurer.floor(self.cases)))
        write_json(bench.as_json(), folder / "bench.json", overwrite=True)
        return bench

    def _bench(self, measurer: "Measurer", variants: Sequence[Variant], runs: list[Run]) -> Bench:
        usual = [run for run in runs if run.arm == BASELINE]
        arms = [
            Arm(v.name, v.flags, v.lossy, summarize([r for r in runs if r.arm == v.name], usual))
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
            target_ssim=self.goals.tune_for or self.goals.least_ssim,
        )

    def _say_tuned(self, found: "dict[str, Tuned]", observer: Observer) -> None:
        for name, tuned in found.items():
            for point in tuned.points:
                mark = " <" if point == tuned.best else ""
                observer.say(
                    f"{name}: threshold {point.threshold:<9.4g} blocks {point.blocks:6.1%}  "
                    f"worst SSIM {point.ssim:.4f}{mark}"
                )
            if tuned.points[-1].ssim >= (self.goals.tune_for or 0):
                observer.say(
                    f"{name}: no threshold was too high; --cachedit-max-warmup-steps and "
                    "--cachedit-max-continuous are what limits it"
                )

    def judge(self, bench: Bench) -> None:
        """Raise QualityError where a variant misses a goal, or an exact one is not exact."""
        least, most = self.goals.least_ssim, self.goals.most_ratio
        missed = []
        for arm in bench.arms[1:]:
            worst, ratio = arm.summary.ssim_worst, 1 / arm.summary.denoise_speed_up.median
            if not arm.lossy and not arm.summary.equal_latents:
                missed.append(f"{arm.name} should be exact, and its latents differ")
            if least is not None and worst is not None and worst < least:
                missed.append(f"{arm.name}: a video frame has SSIM {worst:.4f}, under {least:g}")
            if most is not None and ratio > most:
                missed.append(f"{arm.name}: denoising takes {ratio:.2f} of the time, over {most:g}")
        if missed:
            raise QualityError(
                f"{'; '.join(missed)}.", hint="other thresholds: wancli bench --tune finds them"
            )


def _thresholds(variant: Variant) -> Callable[[float], Variant]:
    """The variant at another threshold of its step cache."""

    def at(threshold: float) -> Variant:
        cache = variant.settings.step_cache
        own = cache.step_cache == "cachedit"
        name = "cachedit_residual_threshold" if own else "step_cache_threshold"
        cache = cache.model_copy(update={name: threshold})
        settings = variant.settings.model_copy(update={"step_cache": cache})
        flags = f"{variant.flags} {flag(name)} {threshold:g}"
        return replace(variant, settings=settings, flags=flags)

    return at


def _check_tunable(variants: Sequence[Variant]) -> None:
    for variant in variants:
        if variant.settings.step_cache.step_cache == "none":
            raise PlanError(
                f"variant '{variant.name}' has no threshold to tune.",
                hint=f'--variant "{variant.name}: {variant.flags} --use-cachedit"',
            )
