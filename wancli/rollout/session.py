"""From what was asked to a rollout's job: plan, schedule, seeds, places, what is there already."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from wancli.catalog.hub_cache import check_reachable
from wancli.catalog.local import check_files, find_spec, revision
from wancli.catalog.vocabulary import vocabulary_warnings
from wancli.config.resolve import Layer, Resolved, resolve
from wancli.config.seeds import parse_seeds
from wancli.config.settings import RolloutSettings
from wancli.cost.capacity import CapacityCheck, check_capacity
from wancli.cost.estimate import Estimate, estimate, resolve_device
from wancli.cost.totals import rollout_cost
from wancli.errors import UsageError, WancliError
from wancli.planning.context import ContextFiles, check_context_files, context_frames
from wancli.planning.lora import find_lora
from wancli.planning.output_files import is_of_rollout, rollout_files, sidecar_files
from wancli.planning.plan import RolloutPlan, check_unused_settings, make_rollout_plan
from wancli.planning.prompts import PromptChange, PromptSchedule, make_prompt_schedule
from wancli.records.naming import name_output, with_name
from wancli.records.progress import Observer, say_warnings
from wancli.records.record import Request
from wancli.utils.files import digest
from wancli.utils.interrupts import Interrupted
from wancli.utils.outputs import OutputFile, OutputSet, nobodys
from wancli.video.ffmpeg import Encoding, check_encoder

if TYPE_CHECKING:
    from wancli.catalog.specs import ModelSpec
    from wancli.rollout.runner import RolloutJob


@dataclass(frozen=True)
class RolloutRequest:
    """What was asked for beside the settings."""

    prompt: str | None
    seed: str | None
    starts: ContextFiles
    output: str | None
    folder: Path
    changes: Sequence[PromptChange] = ()
    latents: Path | None = None
    video: bool = True
    only_new: bool = False
    overwrite: bool = False
    resume: bool = False
    rerender: int | None = None
    report: Path | None = None
    force: bool = False

    @property
    def again(self) -> bool:
        """Whether it goes on with an earlier rollout."""
        return self.resume or self.rerender is not None


class RolloutSession:
    """One rollout on its way from a request to a job."""

    def __init__(
        self, ask: RolloutRequest, layers: list[Layer], *,
        before: Mapping[str, Any], base: Path | None = None,
    ) -> None:  # fmt: skip
        """`before` is the request of an earlier rollout, `base` its folder where it goes on."""
        self.ask, self.before, self.base = ask, before, base
        self.resolved: Resolved[RolloutSettings] = resolve(layers, RolloutSettings)
        check_unused_settings(self.resolved)
        settings = self.resolved.settings
        self.spec: ModelSpec = find_spec(settings.model, layers=settings.machine.layers)
        self._context = context_frames(ask.starts, settings, self.spec, before)
        self.plan = self._plan(settings)
        check_context_files(ask.starts, self.plan, settings, self.spec)
        self.schedule = self._schedule()
        self.seeds = self._seeds()
        if ask.video:
            check_encoder(Encoding.of(settings.output))

    @property
    def warnings(self) -> Sequence[str]:
        """What is to be said of it before it is made."""
        prompts = [] if self.ask.starts.prompt_embeds else self.schedule.prompts
        return vocabulary_warnings(self.spec, prompts)

    @cached_property
    def capacity(self) -> CapacityCheck:
        """What it takes here."""
        return check_capacity(
            self.resolved.settings, self.spec, self._estimated, force=self.ask.force
        )

    def plan_json(self) -> dict[str, Any]:
        """What it comes to, by name."""
        return self.plan.as_json()

    def items(self) -> list[tuple[Request, Path]]:
        """The request, and the name of what it makes."""
        video, latents, store = self.places()
        return [(self.request(), video or latents or store)]

    def make(self, observer: Observer) -> list[dict[str, Any]]:
        """Make it; its record. Raises WancliError."""
        video, latents, store = self.places()
        outputs = self._outputs(video, latents, store)
        with outputs.locked():
            job = self._job(self.request(), video, latents, store)
            return [self._make(job, outputs.replaced, observer)]

    def _make(
        self, job: "RolloutJob", replaced: frozenset[Path], observer: Observer
    ) -> dict[str, Any]:
        self._check_earlier(job)
        say_warnings(self.warnings, observer)
        check_reachable(self.spec.repo)
        since = perf_counter()  # the libraries are part of what loading costs
        # Huge pages: memory given back after each chunk is taken again at 1-4 % and not up to 20.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it when it first allocates
        from wancli.records.write import failed_record
        from wancli.rollout import resume
        from wancli.rollout import runner as roll
        from wancli.rollout.store import RolloutStore

        kept, request = RolloutStore(job.store), job.request
        replaces = self.ask.overwrite and not self.ask.again and bool(kept.chunks())
        settled = self.capacity.with_offload(job.settings)
        job = replace(job, settings=settled, replaces=replaces, replaced=replaced)
        check_files(self.spec, job.parts)
        told = request.as_json()
        if self.ask.again:
            found = resume.go_on(kept, self.before, told, rerender=self.ask.rerender)
            self._say_found(found, observer)
        elif not job.replaces:
            resume.begin(kept, told, overwrite=self.ask.overwrite)
        try:
            with observer.progress() as report:
                record = roll.roll(job, self.spec, report, since=since)
        except (WancliError, Interrupted) as error:
            if not self.ask.again:
                kept.leave_nothing()
            if isinstance(error, WancliError):
                observer.failed(failed_record(request, error, command="rollout"))
            raise
        if self.ask.report:
            from wancli.video.drift_report import write_report

            overwrite = self.ask.report in replaced
            write_report(record.drift, self.ask.report, title=request.prompt, overwrite=overwrite)
        observer.done(record)
        return record.as_json()

    def request(self) -> Request:
        """What is kept, compared and recorded."""
        settings, starts = self.resolved.settings, self.ask.starts
        video = settings.video.model_copy(update={"num_frames": self.plan.num_frames})
        inputs: dict[str, Any] = {
            "changes": [[c.chunk, c.prompt] for c in self.schedule.changes],
            "seeds": [[chunk, seed] for chunk, seed in sorted(self.seeds.items())],
        }
        known = self.before.get("inputs", {})
        inputs |= {k: v for k, v in known.items() if k not in inputs}
        for name, path in starts.named().items():
            inputs[name] = {"name": path.name, "sha256": digest(name, path)}
        if self.ask.only_new:
            inputs["only_new"] = True
        return Request(
            self.schedule.prompt,
            self.seeds[0],
            settings.model_copy(update={"video": video}),
            self.resolved.sources,
            revision(self.spec),
            inputs,
            self.warnings,
        )

    def places(self) -> tuple[Path | None, Path | None, Path]:
        """The video, the latents, and the folder that is kept while they are made."""
        ask = self.ask
        if not ask.video:
            if ask.latents is None:
                raise UsageError(
                    "--no-video needs --save-latents.", hint="--save-latents x.safetensors"
                )
            return None, ask.latents, with_name(ask.latents).with_suffix(".rollout")
        if self.base:
            video = self.base.with_suffix(".mp4")
            return video, ask.latents, self.base
        settings = self.resolved.settings
        fields = {
            "prompt": self.schedule.prompt, "seed": self.seeds[0], "model": settings.model,
            "steps": self.plan.steps[0], "width": settings.video.width,
            "height": settings.video.height,
        }  # fmt: skip
        video = name_output(ask.output, fields, folder=ask.folder, several=False)
        return video, ask.latents, video.with_suffix(".rollout")

    def _plan(self, settings: RolloutSettings) -> RolloutPlan:
        return make_rollout_plan(
            settings, self.spec, context_frames=self._context, force=self.ask.force
        )

    def _estimated(self, settings: RolloutSettings) -> Estimate | None:
        plan = self.plan if settings == self.resolved.settings else self._plan(settings)
        device, wide = resolve_device(settings.machine)
        cost = rollout_cost(settings, self.spec, plan, wide=wide)
        return estimate(cost, settings.machine, device, plan.offloads) if cost else None

    def _schedule(self) -> PromptSchedule:
        chosen, known = self.resolved.settings.rollout, self.before.get("inputs", {})
        changes = self.ask.changes or [PromptChange(*entry) for entry in known.get("changes", [])]
        prompt = self.before.get("prompt", "") if self.ask.prompt is None else self.ask.prompt
        return make_prompt_schedule(prompt, changes, chunks=chosen.chunks, blend=chosen.blend)

    def _seeds(self) -> dict[int, int]:
        known = {int(c): s for c, s in self.before.get("inputs", {}).get("seeds", [])}
        given = parse_seeds(self.ask.seed, None) if self.ask.seed or not known else []
        if len(given) > 1:
            raise UsageError("a rollout has one seed.", hint="--seed 7")
        if self.ask.rerender is None:
            return {**known, 0: given[0]} if given else known
        kept = {chunk: seed for chunk, seed in known.items() if chunk < self.ask.rerender}
        return {**kept, self.ask.rerender: given[0]} if given else known

    def _outputs(self, video: Path | None, latents: Path | None, store: Path) -> OutputSet:
        """All that is written. Raises UsageError where two of them are one file."""
        from wancli.video.write import check_name

        ask = self.ask
        if video:
            check_name(video)
        if ask.report and ask.report.suffix != ".html":
            raise UsageError(f"--report {ask.report} is no .html file.", hint="--report drift.html")
        loras = [find_lora(text).path for text in self.resolved.settings.machine.lora]
        outputs = OutputSet(overwrite=ask.overwrite, reads=[*ask.starts.named().values(), *loras])
        ours = partial(is_of_rollout, before=self.before) if ask.again else nobodys
        for path, flag in ((video, "--output"), (latents, "--save-latents")):
            if path:
                outputs.add(OutputFile(path, flag, ours))
        outputs.add(*sidecar_files(video or latents or store), *rollout_files(store, video))
        if ask.report:
            outputs.add(OutputFile(ask.report, "--report"))
        return outputs

    def _check_earlier(self, job: "RolloutJob") -> None:
        """Raise UsageError where another rollout would be lost."""
        free = self.ask.overwrite or self.ask.again
        if not free and any(job.store.glob("chunk-*.safetensors")):
            again = f"wancli rollout --resume -o {job.video}" if job.video else "--resume"
            raise UsageError(
                f"{job.store} holds a rollout already.",
                hint=f"{again}, --overwrite or other names",
            )

    def _job(
        self, request: Request, video: Path | None, latents: Path | None, store: Path
    ) -> "RolloutJob":
        from wancli.rollout.context import InitialContext, ResearchTensors
        from wancli.rollout.runner import RolloutJob

        starts = self.ask.starts
        return RolloutJob(
            request=request,
            settings=self.resolved.settings,
            plan=self.plan,
            schedule=self.schedule,
            seeds=self.seeds,
            store=store,
            video=video,
            given=InitialContext(starts.image, starts.extend, starts.initial_latents),
            inputs=ResearchTensors(starts.noise_file, starts.prompt_embeds),
            latents=latents,
            only_new=bool(request.inputs.get("only_new")),
        )

    def _say_found(self, found: Any, observer: Observer) -> None:
        observer.say(f"{found.chunks} of {len(self.plan.spans)} chunks are kept")
        if found.damaged:
            observer.warn(
                f"damaged or exchanged chunks were put into {found.damaged}.",
                hint="they are made again",
            )
        if found.no_digests:
            observer.warn(
                "the chunks have no digests: they are taken as they are.",
                hint="an earlier version made them",
            )
