import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from wancli.benchmark.cases import (
    Arm,
    Bench,
    NoiseFloor,
    Run,
    SpeedUp,
    Summary,
    noise_floor,
    summarize,
)
from wancli.records.record import ForwardStats
from wancli.video.compare import LatentQuality, Measured, Quality, psnr

SETTINGS = {"steps": 4, "num_frames": 9, "width": 64, "height": 48, "fps": 16}
MACHINE = {"device": "cpu", "dtype": "float32", "torch": "2.13.0"}
ARMS = {"baseline": 8.0, "exact": 7.5, "fast": 4.0, "slow": 10.0}  # seconds
WORST = {"fast": 0.8123, "slow": 0.9045}  # SSIM


def quality(worst: float) -> Quality:
    return Quality(
        frames=9,
        ssim=Measured((1 + worst) / 2, worst, 5),
        mse=Measured(40 * (1 - worst), 90 * (1 - worst), 5),
        temporal_levels=Measured(2.125, 4.5, 6),
        max_levels=99,
        equal=False,
    )


def stats(*reused: int) -> tuple[ForwardStats, ...]:
    """Stats of four steps with two branches; some cond forwards are reused."""
    return tuple(
        ForwardStats(step, branch, 8 if step in reused and branch == "cond" else 30, 30,
            reused=step in reused and branch == "cond", residual=0.0525 if step else None)
        for step in range(4)
        for branch in ("cond", "uncond")
    )  # fmt: skip


def run_of(arm: str, prompt: str, seed: int) -> Run:
    seconds = ARMS[arm] + seed / 4
    same = arm == "exact"
    latents = LatentQuality(0 if same else 1.5, 0 if same else 0.0777, None, equal=same)
    default = quality(WORST.get(arm, 0.99) + seed / 1000)
    return Run(
        arm,
        prompt,
        seed,
        video=f"videos/{arm}-{seed}-{len(prompt)}.mp4",
        denoise_s=seconds,
        decode_s=1.25,
        total_s=seconds + 2,
        uses=stats(2, 3) if arm == "fast" else stats(),
        quality=None if arm == "baseline" else replace(default, equal=same),
        latents=None if arm == "baseline" else latents,
    )


def bench_of(prompts: Sequence[str] = ("a red circle", "a blue square")) -> Bench:
    runs = [run_of(arm, prompt, seed) for prompt in prompts for seed in (0, 1) for arm in ARMS]
    baseline = [run for run in runs if run.arm == "baseline"]
    arms = [
        Arm(
            name,
            "" if name == "baseline" else f"--flag-of {name}",
            lossy=name in WORST,
            summary=summarize([run for run in runs if run.arm == name], baseline),
        )
        for name in ARMS
    ]
    return Bench(
        "2026-01-01T00:00:00+00:00",
        "bench …",
        "demo",
        MACHINE,
        SETTINGS,
        tuple(arms),
        tuple(runs),
        floor=NoiseFloor(0.7011, 0.6022, 2),
    )


def test_a_summary_pairs_runs_by_prompt_and_seed():
    baseline = [run_of("baseline", p, s) for p in "xy" for s in (0, 1)]
    fast = [replace(run, arm="fast", denoise_s=run.denoise_s / k, quality=quality(0.9),
                    latents=LatentQuality(1, 0.1, 20, equal=k == 1))
            for run, k in zip(reversed(baseline), (1, 2, 3, 4), strict=True)]  # fmt: skip
    summary = summarize(fast, baseline)
    assert summary.denoise_speed_up == SpeedUp(2.5, 1, 4)
    assert summary.equal_latents is False
    assert summary.ssim == pytest.approx(0.95)
    assert summary.psnr_db == pytest.approx(psnr(4))
    assert summarize(baseline, baseline).denoise_speed_up == SpeedUp(1, 1, 1)
    assert summarize(baseline, baseline).ssim is None
    assert summarize(baseline, baseline).equal_latents is None


def test_a_summary_has_the_overall_worst_and_the_mean_of_means():
    baseline = [run_of("baseline", p, 0) for p in "xyz"]
    runs = [replace(run, quality=quality(worst), peak_gib=gib) for run, worst, gib in
            zip(baseline, (0.9, 0.5, 0.8), (1.0, 3.0, None), strict=True)]  # fmt: skip
    summary = summarize(runs, baseline)
    assert summary.ssim_worst == 0.5
    assert summary.ssim == pytest.approx((0.95 + 0.75 + 0.9) / 3)
    # the error is pooled before taking the logarithm
    assert summary.psnr_db == pytest.approx(psnr(40 * (0.1 + 0.5 + 0.2) / 3))
    assert summary.peak_gib == 3.0
    assert summary.blocks == summary.blocks_all == 3 * 8 * 30


def test_reused_forwards_and_computed_blocks_are_counted():
    fast = run_of("fast", "x", 0)
    summary = summarize([fast], [run_of("baseline", "x", 0)])
    assert (summary.forwards_reused, summary.forwards) == (2, 8)
    assert (summary.blocks, summary.blocks_all) == (6 * 30 + 2 * 8, 8 * 30)


def test_the_noise_floor_has_the_mean_of_pairs_and_the_overall_worst():
    assert noise_floor([]) is None
    assert noise_floor([quality(0.5), quality(0.7)]) == NoiseFloor(0.8, 0.5, 2)


def test_a_bench_is_strictly_valid_json():
    report = json.loads(json.dumps(bench_of().as_json(), allow_nan=False))
    assert report["schema"] == "wancli.bench/1"
    assert report["identity"] is True
    assert report["runs"][0]["quality"] is None
    assert report["runs"][1]["quality"]["psnr_db"]["frame"] == 5
    assert report["runs"][2]["uses"][4]["reused"] is True
    assert set(report["arms"][2]["summary"]) == set(Summary.__dataclass_fields__)


def test_identity_is_unknown_without_an_exact_measured_variant():
    bench = bench_of()
    lossy = replace(bench, arms=(bench.arms[0], bench.arms[2]))
    assert lossy.identity is None
    unseen = replace(bench.arms[1], summary=replace(bench.arms[1].summary, equal_latents=None))
    assert replace(bench, arms=(bench.arms[0], unseen)).identity is None
