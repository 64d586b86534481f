"""A few steps of the demo's distillation: it resumes exactly and learns a LoRA."""

import pytest
import torch
from diffusers import WanPipeline

from tests.demo.test_recipe import assert_same, data, small_steps
from wancli.demo import distill as recipe
from wancli.demo import parts
from wancli.demo.dataset import Dataset
from wancli.demo.distill import (
    Distillation,
    TrainableLora,
    distill,
    rollout_batch,
    snap_to_timesteps,
    start_rollouts,
    write_lora,
)
from wancli.demo.parts import CHUNK, make_text_encoder, make_tokenizer, make_transformer
from wancli.demo.training import load_checkpoint
from wancli.demo.transformer import (
    FRAMES,
    Batch,
    DemoModel,
    TrainingForward,
    draw_batch,
    to_sigmas,
)
from wancli.generation.flow import guide
from wancli.models.lora import merge_loras
from wancli.planning.lora import Lora

__all__ = ["data", "small_steps"]
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")


@pytest.fixture(autouse=True)
def few_layers(monkeypatch):
    monkeypatch.setattr(parts, "LAYERS", 2)


def make_model() -> DemoModel:
    """Untrained, except for a last layer that is not zero."""
    transformer = make_transformer()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        transformer.proj_out.weight.normal_(std=0.05, generator=generator)
    return DemoModel(transformer, make_text_encoder(len(make_tokenizer())))


def make_job(model: DemoModel) -> Distillation:
    """Teacher and student are the same model, on 4x4 latents."""
    views = TrainingForward(tokens_per_frame=4, device="cpu")
    return Distillation(model.transformer, model.transformer, model.text_encoder, views)


def draw(data: Dataset, *, causal_share: float) -> Batch:
    return draw_batch(data, 0, causal_share=causal_share, clips=2, tokenizer=make_tokenizer())


@pytest.mark.slow
def test_an_interrupted_distillation_resumes_exactly(tmp_path, data, monkeypatch):
    monkeypatch.setattr(recipe, "CAUSAL_SHARE", 1.0)
    monkeypatch.setattr(recipe, "ROLLOUT_SHARE", 1.0)
    whole = distill(tmp_path / "whole", make_model(), data, steps=2, clips=2)
    first = distill(tmp_path / "cut", make_model(), data, steps=1, clips=2)
    assert_same(distill(tmp_path / "cut", make_model(), data, steps=2, clips=2), whole)
    assert not all(torch.equal(first[name], value) for name, value in whole.items())
    assert_same(*(load_checkpoint(tmp_path / work / "distill.pt") for work in ("whole", "cut")))


def test_gradients_of_the_factors_match_autograd():
    transformer = make_transformer()
    lora = TrainableLora(transformer)
    name, layer = next(iter(lora.layers.items()))
    down, up = (lora.factors[f"{name}.lora_{which}.weight"] for which in "AB")
    torch.nn.init.normal_(up, generator=torch.Generator().manual_seed(0))
    lora.merge()
    inputs = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
    layer(inputs).square().sum().backward()
    lora.collect_gradients()
    exact = [factor.detach().clone().requires_grad_() for factor in (down, up)]
    weight = lora.base[name] + exact[1] @ exact[0]
    torch.nn.functional.linear(inputs, weight, layer.bias.detach()).square().sum().backward()
    for ours, theirs in zip((down, up), exact, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert layer.weight.grad is None


def test_the_written_lora_merges_to_the_trained_weights(tmp_path):
    student = make_transformer()
    lora = TrainableLora(student)
    generator = torch.Generator().manual_seed(0)
    for factor in lora.factors.values():
        torch.nn.init.normal_(factor, std=0.1, generator=generator)
    lora.merge()
    path = tmp_path / "lora.safetensors"
    write_lora(lora.state_dict(), path)
    pipeline = WanPipeline(None, None, transformer=make_transformer(), vae=None, scheduler=None)
    merge_loras(pipeline, [Lora(path)])
    for name, layer in lora.layers.items():
        merged = pipeline.transformer.get_submodule(name).weight
        torch.testing.assert_close(merged, layer.weight, atol=1e-3, rtol=0)


def test_the_whole_lora_is_under_a_megabyte(tmp_path, monkeypatch):
    monkeypatch.undo()  # all layers
    path = tmp_path / "lora.safetensors"
    write_lora(TrainableLora(make_transformer()).state_dict(), path)
    assert path.stat().st_size < 1e6


def test_own_rollouts_grow_to_a_window_and_then_move_it(data):
    job, like = make_job(make_model()), data.latents[:2]
    rollouts = start_rollouts(data.scenes, 0, like, job.forward)
    windows = []
    for seed in range(4):
        rollouts = job.extend(rollouts, seed)
        windows.append((rollouts.first, rollouts.latents.shape[2]))
    assert windows == [(0, CHUNK), (0, 2 * CHUNK), (0, FRAMES), (CHUNK, FRAMES)]
    batch = rollout_batch(rollouts, 0)
    assert (batch.offset.item(), batch.masked) == (CHUNK, CHUNK)
    assert batch.context is not None
    assert torch.equal(batch.context, rollouts.latents[:, :, :-CHUNK])


def test_a_consistent_model_has_no_error(data):
    job = make_job(make_model())
    with torch.no_grad():
        job.student.proj_out.weight.zero_()
        job.student.proj_out.bias.zero_()  # velocity 0 everywhere: no step changes the latents
    batch = snap_to_timesteps(draw(data, causal_share=0.0))
    assert job.loss(batch).item() == 0.0


def test_timesteps_of_the_distillation_are_those_of_the_student(data):
    batch = draw(data, causal_share=1.0)
    sigmas = to_sigmas(snap_to_timesteps(batch).times)
    levels = [level.sigma for level in make_job(make_model()).levels]
    assert {round(sigma, 5) for sigma in sigmas.flatten().tolist()} <= {round(s, 5) for s in levels}
    assert (sigmas >= to_sigmas(batch.times) - 1e-6).all()


@torch.no_grad()
def test_the_teacher_is_guided_as_in_two_forwards(data):
    job, batch = make_job(make_model()), draw(data, causal_share=1.0)
    text, empty = (
        job.forward.embed(job.text_encoder, *job.forward.tokenize([prompt] * 2))
        for prompt in ("a red circle", "")
    )
    cond, uncond = (
        job.forward.velocity(job.teacher, batch, batch.noisy(), t).float() for t in (text, empty)
    )
    ours = job.guided(batch, batch.noisy(), text, empty)
    torch.testing.assert_close(ours, guide(cond, uncond, recipe.GUIDANCE), atol=1e-2, rtol=1e-2)
