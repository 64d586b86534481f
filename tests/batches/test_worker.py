"""A batch's worker: jobs fail one by one, those of a model that does not load fail together."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np
import pytest

from tests.batches.fakes import FakeMaker, FakeWorker, fake_ledger
from tests.fakes import tiny_image
from wancli.api.requests import Listener
from wancli.batches import worker as worker_module
from wancli.batches.jobs import JOB_KEYS
from wancli.batches.plan import plan_batch
from wancli.batches.worker import BatchWorker, JobOutcome
from wancli.errors import CapacityError, InputError, OutputError, UsageError
from wancli.planning.jobs import read_jobs
from wancli.records.ledger import Ledger, create_ledger
from wancli.records.progress import ChunkDone, Event, Phase, Step

SMALL = 'steps = 1\nnum_frames = 5\nsize = "32x32"\n'


@contextmanager
def batch(folder: Path, text: str, *, small: str = SMALL) -> Iterator[Ledger]:
    """The ledger of the jobs of a TOML file."""
    path = folder / "j.toml"
    path.write_text(f"[defaults]\n{small}{text}")
    read = read_jobs(path, JOB_KEYS)
    planned = plan_batch(read, folder, Listener(None))
    ledger = folder / "j.ledger"
    with create_ledger(ledger, read.digest, planned.settings, planned.jobs, version="1") as opened:
        yield opened


def run(ledger: Ledger, **options: Any) -> tuple[list[JobOutcome], list[str]]:
    """What a worker makes of all jobs, and the phases that it went through."""
    phases: list[str] = []

    def report(event: Event) -> None:
        if isinstance(event, Phase):
            phases.append(event.name)

    return list(BatchWorker(ledger, report=report, **options).run()), phases


def test_a_model_loads_once_for_clips_and_rollouts(tmp_path: Path, tiny_model: Path):
    jobs = '[[jobs]]\nprompt = "a circle"\nseed = [1, 2]\n'
    with batch(tmp_path, f'model = "{tiny_model}"\n{jobs}') as ledger:
        outcomes, phases = run(ledger)
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert phases.count("load") == 1


def test_presets_of_one_model_share_its_weights(tmp_path: Path, tiny_model: Path):
    for steps in (2, 3):
        preset = f'model = "{tiny_model}"\n[sampling]\nsteps = {steps}\nflow_shift = {steps}.0\n'
        (tmp_path / f"{steps}.toml").write_text(preset)
    presets = [str(tmp_path / f"{steps}.toml") for steps in (2, 3)]
    jobs = (
        f'[[jobs]]\nprompt = "a circle"\nseed = 1\noutput = "{{steps}}.mp4"\npreset = {presets}\n'
    )
    with batch(tmp_path, jobs, small=SMALL.replace("steps = 1\n", "")) as ledger:
        outcomes, phases = run(ledger)
    assert phases.count("load") == 1
    sampling = [(outcome.record or {})["request"]["sampling"] for outcome in outcomes]
    assert [(one["steps"], one["flow_shift"]) for one in sampling] == [(2, 2.0), (3, 3.0)]


ROLLOUT = '[[jobs]]\ncommand = "rollout"\nprompt = "a circle"\nseed = 1\noutput = "r.mp4"\n'


def rollouts(model: Path) -> str:
    """The defaults of small rollouts."""
    return f'size = "32x32"\nscheduler = "unipc"\nsteps = 1\nmodel = "{model}"\n'


def test_videos_that_are_whole_are_kept(tmp_path: Path, tiny_model: Path):
    with batch(tmp_path, f"{ROLLOUT}chunks = 1\n", small=rollouts(tiny_model)) as ledger:
        assert [outcome.status for outcome in run(ledger)[0]] == ["ok"]
        (video,) = tmp_path.glob("*.mp4")
        ledger.retry(ledger.numbers("done"))
        assert [outcome.status for outcome in run(ledger)[0]] == ["skipped"]
        ledger.retry(ledger.numbers("skipped"))
        video.write_bytes(video.read_bytes()[:-2000])
        assert [outcome.status for outcome in run(ledger)[0]] == ["ok"]


@pytest.fixture
def rolled(tmp_path: Path, tiny_model: Path) -> Callable[..., JobOutcome]:
    """What becomes of a rollout in a ledger of its own."""

    def roll(values: str, **options: Any) -> JobOutcome:
        (tmp_path / "j.ledger").unlink(missing_ok=True)
        with batch(tmp_path, ROLLOUT + values, small=rollouts(tiny_model)) as ledger:
            (outcome,), _ = run(ledger, **options)
        return outcome

    return roll


def test_a_rollout_goes_on_with_its_own_chunks_and_never_with_those_of_another(
    tmp_path: Path, rolled: Callable[..., JobOutcome]
):
    video, store = tmp_path / "r.mp4", tmp_path / "r.rollout"
    store.mkdir()  # of one that was killed before it wrote anything
    assert rolled("chunks = 1", skip_existing=True).status == "ok"
    before = video.read_bytes()
    other = rolled("chunks = 1\nsteps = 2", skip_existing=True)
    assert "r.mp4 exists and comes from another request" in str(other.error)
    assert video.read_bytes() == before
    video.unlink()
    other = rolled("chunks = 1\nsteps = 2", skip_existing=True)
    assert "r.rollout exists: the rollout was started with other settings" in str(other.error)
    longer = rolled("chunks = 2\ncrf = 30", skip_existing=True)
    assert longer.record
    assert longer.record["request"]["output"]["crf"] == 30
    chunks = longer.record["timings"]["chunks"]
    assert [chunk["made"] for chunk in chunks] == [False, True]
    video.unlink()
    fewer = rolled("chunks = 1", skip_existing=True)
    assert "r.rollout exists: `chunks 1`: 2 are already finished" in str(fewer.error)
    for status in ("ok", "skipped"):
        assert rolled("chunks = 1\noverwrite = true", skip_existing=True).status == status
    assert rolled("chunks = 1\ncrf = 30\noverwrite = true", skip_existing=True).status == "ok"


def test_names_are_filled_once_and_files_are_where_the_batch_reserved_them(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "{seed}"
    (folder / "{home").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(folder / "{home"))
    common = 'prompt = "a circle"\nseed = 1\nsave_latents = "~/{model:3}-{seed}.safetensors"\n'
    clip = f'[[jobs]]\n{common}model = "{tiny_model}"\nsize = "32x32"\nnum_frames = 5\n'
    rollout = (
        f'[[jobs]]\n{common}command = "rollout"\nchunks = 1\noutput = "{{{{x}}}}-{{seed}}.mp4"\n'
    )
    rollout += f"report = '{tmp_path}/{{seed}}.html'\nmodel = 'demo'\nsize = '48x48'\n"
    with batch(folder, clip + rollout, small="steps = 1\n") as ledger:
        made, _ = run(ledger)
        assert [outcome.error for outcome in made] == [None, None]
        ledger.retry(ledger.numbers("done"))
        kept, _ = run(ledger)
        assert [outcome.status for outcome in kept] == ["skipped", "skipped"]
        ids = [[end.record["id"] for end in ends if end.record] for ends in (made, kept)]
        assert ids[0] == ids[1]
    assert {path.name for path in folder.glob("*.mp4")} == {"a-circle-1.mp4", "{x}-1.mp4"}
    assert len(list((folder / "{home").glob("*-1.safetensors"))) == 2
    assert (tmp_path / "1.html").exists()


def test_a_damaged_rollout_is_replaced_with_its_report_and_latents(
    tmp_path: Path, rolled: Callable[..., JobOutcome]
):
    files = {"save_latents": tmp_path / "z.safetensors", "report": tmp_path / "z.html"}
    values = "chunks = 1\n" + "".join(f"{name} = '{path}'\n" for name, path in files.items())
    assert rolled(values).status == "ok"
    assert rolled(values, skip_existing=True).status == "skipped"
    video = tmp_path / "r.mp4"
    video.write_bytes(video.read_bytes()[:-2000])
    shutil.rmtree(tmp_path / "r.rollout")
    assert rolled(values, skip_existing=True).status == "ok"
    files["report"].write_text("mine")
    video.unlink()
    assert "z.html exists" in str(rolled(values, skip_existing=True).error)


def test_latents_of_a_job_that_did_not_decode_them_are_replaced_by_its_own(
    tmp_path: Path, tiny_model: Path
):
    def made(*values: str, **options: Any) -> JobOutcome:
        (tmp_path / "a.mp4").unlink(missing_ok=True)
        (tmp_path / "j.ledger").unlink(missing_ok=True)
        job = [f'model = "{tiny_model}"', "[[jobs]]", 'prompt = "a"', "seed = 1", 'output="a.mp4"']
        job += [f'save_latents = "{tmp_path}/z.safetensors"', *values]
        with batch(tmp_path, "\n".join(job)) as ledger:
            (outcome,), _ = run(ledger, **options)
        return outcome

    assert made().status == "ok"
    assert "z.safetensors exists" in str(made().error)
    assert made(skip_existing=True).status == "ok"
    assert made('dtype = "bfloat16"', skip_existing=True).status == "ok"  # as with `adapt`
    assert "z.safetensors exists" in str(made("flow_shift = 3.0", skip_existing=True).error)


def test_jobs_whose_model_does_not_load_fail_together(tmp_path: Path, tiny_model: Path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    jobs = f'[[jobs]]\nprompt = "a circle"\nseed = "1-3"\nmodel = "{model}"\n'
    jobs += f'[[jobs]]\nprompt = "a square"\nseed = 4\nmodel = "{tiny_model}"\n'
    with batch(tmp_path, jobs) as ledger:
        for file in model.glob("transformer/*.safetensors"):
            file.write_bytes(b"no weights")
        (failed, made), _ = run(ledger)
        errors = {row["error"] for row in ledger.rows("failed")}
        assert ledger.counts() | {"failed": 3, "done": 1} == ledger.counts()
    assert failed.error
    assert failed.others == 2
    assert len(errors) == 1
    assert made.error is None


def test_a_job_whose_input_is_gone_fails_alone(tmp_path: Path, tiny_model: Path):
    job = ROLLOUT.replace('output = "r.mp4"\n', "chunks = 1\n")
    for name in ("a.png", "b.png"):
        tiny_image(tmp_path / name, 1)
    jobs = "".join(f'{job}image = "{tmp_path}/{n}.png"\noutput = "{n}.mp4"\n' for n in "ab")
    with batch(tmp_path, jobs, small=rollouts(tiny_model)) as ledger:
        (tmp_path / "a.png").unlink()
        (failed, made), _ = run(ledger)
    assert isinstance(failed.error, InputError)
    assert (failed.others, made.error) == (0, None)


def test_errors_of_jobs_name_their_keys_and_not_keyword_arguments(tmp_path: Path, tiny_model: Path):
    job = f'[[jobs]]\nprompt = "a circle"\nmodel = "{tiny_model}"\noutput = "a.mp4"\n'
    with batch(tmp_path, job) as ledger:
        (tmp_path / "a.mp4").write_text("mine")
        (outcome,), _ = run(ledger)
    assert outcome.error
    assert outcome.error.hint.startswith("the key overwrite of a job")


def test_an_unexpected_error_fails_its_job_only(tmp_path: Path, tiny_model: Path):
    jobs = f'[[jobs]]\nprompt = "a circle"\nmodel = "{tiny_model}"\nseed = [1, 2]\n'
    first = True

    def report(event: Event) -> None:
        nonlocal first
        if first and event == Phase("denoise"):
            first = False
            raise RuntimeError("of a library")

    with batch(tmp_path, jobs) as ledger:
        failed, made = list(BatchWorker(ledger, report=report).run())
    assert "RuntimeError: of a library" in str(failed.error)
    assert made.error is None


def test_a_cancelled_job_ends_alone_even_while_its_model_loads(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(worker_module, "BEAT_S", -1)  # at each event
    jobs = f'model = "{tiny_model}"\n[[jobs]]\nprompt = "a circle"\nseed = "1-3"\n'
    with batch(tmp_path, jobs) as ledger:

        def cancel(event: Event) -> None:
            if isinstance(event, Phase) and event.name == "load":
                ledger.cancel([1])
            if isinstance(event, Step):
                ledger.cancel([2])

        outcomes = list(BatchWorker(ledger, report=cancel).run())
        assert [outcome.status for outcome in outcomes] == ["cancelled", "cancelled", "ok"]
        assert [row["state"] for row in ledger.rows()] == ["cancelled", "cancelled", "done"]
    assert len(list(tmp_path.glob("*.mp4"))) == 1


def failing(
    monkeypatch: pytest.MonkeyPatch, error: Exception, *, times: int, of: Any = FakeMaker,
    name: str = "make",
) -> None:  # fmt: skip
    """Let the first calls of a function fail."""
    real = getattr(of, name)
    left = iter(range(times))

    def call(*arguments: Any, **options: Any) -> Any:
        if next(left, None) is not None:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(of, name, call)


MEMORY = CapacityError("out of memory.", hint="a smaller `size`")


def statuses(ledger: Ledger, **options: Any) -> list[str]:
    """What becomes of jobs that a worker without a model makes."""
    return [outcome.status for outcome in FakeWorker(ledger, **options).run()]


@pytest.mark.parametrize("error", [MEMORY, worker_module._NotLoaded(MEMORY)])
def test_a_failed_job_keeps_no_memory_from_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    tensors: list[Any] = []

    def run_out(*_: object) -> None:
        tensor = np.zeros(3)
        tensors.append(ref(tensor))
        raise MemoryError

    def make(*_: object) -> None:
        try:
            run_out()
        except MemoryError:
            raise error from None

    monkeypatch.setattr(FakeMaker, "make", make)
    with fake_ledger(tmp_path, ["a"]) as ledger:
        (outcome,) = FakeWorker(ledger).run()
    assert outcome.error is MEMORY
    assert tensors[0]() is None


@pytest.mark.parametrize("error", [MEMORY, RuntimeError("of a library")])
def test_what_may_pass_is_tried_again_so_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    failing(monkeypatch, error, times=2)
    with fake_ledger(tmp_path, ["a"]) as ledger:
        assert statuses(ledger, retries=1) == ["again", "failed"]
        ledger.retry(ledger.numbers("failed"))
        assert statuses(ledger, retries=1) == ["ok"]


def test_what_does_not_pass_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    failing(monkeypatch, UsageError("no.", hint="yes"), times=1)
    with fake_ledger(tmp_path, ["a"]) as ledger:
        assert statuses(ledger, retries=5) == ["failed"]


def test_a_full_disk_ends_the_worker_and_gives_its_job_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    full = OutputError("cannot write a.mp4: No space left on device.", hint="free some space")
    failing(monkeypatch, full, times=1)
    with fake_ledger(tmp_path, ["a", "a", "a"]) as ledger:
        with pytest.raises(OutputError, match="No space"):
            statuses(ledger)
        assert ledger.counts()["pending"] == 3
        assert statuses(ledger) == ["ok"] * 3


def test_jobs_that_run_out_of_memory_go_on_with_less(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    failing(monkeypatch, MEMORY, times=1, of=worker_module, name="_make_video")
    jobs = f'[[jobs]]\nprompt = "a circle"\nseed = "1-3"\nmodel = "{tiny_model}"\n'
    with batch(tmp_path, jobs) as ledger:
        outcomes, phases = run(ledger, adapt=True)
        again, *made = outcomes
        assert again.again == "it goes on with `dtype bfloat16`"
        assert phases.count("load") == 2
        dtypes = [(o.record or {})["request"]["machine"]["dtype"] for o in made]
        assert dtypes == ["bfloat16"] * 3
        assert {row["settings"] for row in ledger.rows("done")} == {1}
    (tmp_path / "j.ledger").unlink()
    video, warnings = tmp_path / "a-circle-1.mp4", list[str]()
    video.write_bytes(video.read_bytes()[:-2000])
    with batch(tmp_path, jobs) as ledger:  # whose record says that this was not asked for
        outcomes, _ = run(ledger, skip_existing=True, warn=lambda text, **_: warnings.append(text))
        assert [outcome.status for outcome in outcomes] == ["ok", "skipped", "skipped"]
        assert warnings[0].startswith(f"{video} is damaged")
    (tmp_path / "j.ledger").unlink()
    with batch(tmp_path, f"{jobs}vae_dtype = 'bfloat16'\n") as ledger:
        assert [outcome.status for outcome in run(ledger, skip_existing=True)[0]] == ["failed"] * 3


def test_a_rollout_begins_again_with_less_memory(tmp_path: Path, tiny_model: Path):
    chunks = 0

    def report(event: Event) -> None:
        nonlocal chunks
        chunks += isinstance(event, ChunkDone)
        if isinstance(event, ChunkDone) and chunks == 1:
            raise MEMORY

    with batch(tmp_path, f"{ROLLOUT}chunks = 2\n", small=rollouts(tiny_model)) as ledger:
        again, made = BatchWorker(ledger, report=report, adapt=True).run()
    assert again.again == "it goes on with `dtype bfloat16`"
    assert made.record
    assert made.record["request"]["machine"]["dtype"] == "bfloat16"
    assert [chunk["made"] for chunk in made.record["timings"]["chunks"]] == [True, True]


def test_a_job_that_takes_too_long_ends_at_its_next_step(tmp_path: Path, tiny_model: Path):
    job = f'[[jobs]]\nprompt = "a circle"\nseed = 1\nmodel = "{tiny_model}"\n'
    with batch(tmp_path, job) as ledger:
        (outcome,), _ = run(ledger, timeout=1e-9, retries=3)
    assert outcome.status == "failed"
    assert "it took over" in str(outcome.error)
    assert "`timeout`" in (outcome.error.hint if outcome.error else "")
    assert not list(tmp_path.glob("*.mp4"))
