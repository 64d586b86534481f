"""A few steps of the demo's training: it resumes exactly, and its tokenizer knows the world."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from wancli.catalog.decoder_files import add_vae_decoder
from wancli.catalog.specs import SPECS
from wancli.catalog.tiny_decoder import DEMO_SHAPE
from wancli.demo import autoencoder
from wancli.demo.autoencoder import (
    CHANNELS,
    STAGES,
    Stage,
    autoencoder_losses,
    crops,
    decode_whole,
    draw_latents,
    encode_whole,
    make_autoencoder,
    train_autoencoder,
)
from wancli.demo.dataset import Dataset
from wancli.demo.lean import make_lean_autoencoder
from wancli.demo.parts import (
    TEXT_LENGTH,
    make_text_encoder,
    make_tokenizer,
    make_transformer,
    tokenize,
)
from wancli.demo.tiny_decoder import TinyBudget, train_tiny_decoder, write_tiny_decoder
from wancli.demo.training import (
    BatchedMuon,
    CapturedStep,
    Optimizer,
    load_checkpoint,
    rate,
    stop,
)
from wancli.demo.transformer import DemoModel, TrainingForward, draw_batch, train_transformer
from wancli.demo.world import (
    BACKGROUNDS,
    COLORS,
    FILLERS,
    MOTIONS,
    SHAPES,
    SYNONYMS,
    TEMPLATES,
    combinations,
)

STEPS, STOP = 2, 1

# Autocast leaves the norms' weights in float32, which torch warns is slower.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(autoencoder, "CROP", 32)


@pytest.fixture
def data() -> Dataset:
    """Four clips of noise, 4x4 latents: only the steps are tested."""
    latents = torch.randn(4, CHANNELS, 12, 4, 4, generator=torch.Generator().manual_seed(0))
    scenes = combinations(held_out=False)[::200][:4]
    return Dataset(latents, scenes, [0.0] * CHANNELS, [1.0] * CHANNELS)


def assert_same(ours: object, other: object) -> None:
    """Equal in every leaf, tensors bit by bit."""
    assert type(ours) is type(other)
    if isinstance(ours, dict) and isinstance(other, dict):
        assert ours.keys() == other.keys()
        for key in ours:
            assert_same(ours[key], other[key])
    elif isinstance(ours, list | tuple) and isinstance(other, list | tuple):
        assert len(ours) == len(other)
        for pair in zip(ours, other, strict=True):
            assert_same(*pair)
    elif isinstance(ours, torch.Tensor) and isinstance(other, torch.Tensor):
        assert torch.equal(ours, other)
    else:
        assert ours == other


def test_the_first_steps_are_warmup_however_many_steps_follow():
    # So that STOP steps are the beginning of STEPS steps in the tests below.
    assert [rate(s, STOP) for s in range(STOP)] == [rate(s, STEPS) for s in range(STOP)]


@pytest.mark.slow
def test_an_interrupted_transformer_training_resumes_exactly_and_is_not_repeated(
    tmp_path, data, monkeypatch
):
    def train(work):
        return train_transformer(tmp_path / work, data, steps=2, clips=2, compile_blocks=False)

    whole = train("whole").state_dict()
    monkeypatch.setattr(stop, "requested", True)  # as SIGTERM does
    with pytest.raises(SystemExit, match="0"):
        train("resumed")
    path = tmp_path / "resumed" / "transformer.pt"
    stopped = load_checkpoint(path)
    assert stopped
    assert stopped["step"] == 1
    monkeypatch.undo()
    assert_same(train("resumed").state_dict(), whole)
    assert not all(torch.equal(stopped["average"][name], value) for name, value in whole.items())
    assert_same(load_checkpoint(path), load_checkpoint(tmp_path / "whole" / "transformer.pt"))
    curve = path.with_suffix(".jsonl").read_text()
    assert_same(train("resumed").state_dict(), whole)
    assert path.with_suffix(".jsonl").read_text() == curve


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
def test_captured_steps_train_as_those_that_are_called(tmp_path, data, monkeypatch):
    def train(work) -> list[float]:
        train_transformer(tmp_path / work, data, steps=14, clips=2, device="cuda")
        lines = (tmp_path / work / "transformer.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    captured = train("captured")
    monkeypatch.setattr(CapturedStep, "EAGER", 100)
    assert captured == pytest.approx(train("called"), rel=0.02)


@pytest.mark.parametrize("causal_share", [0.0, 1.0])
def test_the_lean_gradients_are_those_of_the_model(data, causal_share):
    whole, lean = (
        TrainingForward(tokens_per_frame=4, device="cpu", lean=lean) for lean in (False, True)
    )
    model = DemoModel(make_transformer(), make_text_encoder(len(whole.tokenizer)))
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.05, generator=generator)
    batch = draw_batch(data, 3, causal_share=causal_share, clips=2, tokenizer=whole.tokenizer)
    losses, gradients = [], list[torch.Tensor]()
    for forward in (whole, lean):
        losses.append(forward.gradients(model)(batch).item())
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    ours, theirs = gradients  # both round to bfloat16, in different places
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.999


def stages(*steps: int) -> list[Stage]:
    """The recipe's stages with these numbers of steps, on the shortest clips."""
    return [
        replace(stage, steps=count, clips=(5,), frames=5)
        for stage, count in zip(STAGES, steps, strict=False)
    ]


@pytest.mark.slow
def test_an_interrupted_autoencoder_training_resumes_exactly_and_ends_with_the_encoder_alone(
    tmp_path,
):
    whole = train_autoencoder(tmp_path / "whole", stages=stages(STEPS, STEPS)).state_dict()
    cut = [stages(STOP), stages(STEPS, STOP), stages(STEPS, STEPS)]
    runs = [train_autoencoder(tmp_path / "resumed", stages=s).state_dict() for s in cut]
    assert_same(runs[-1], whole)
    assert not all(torch.equal(runs[1][name], value) for name, value in whole.items())
    for stage in STAGES:
        ends = [
            load_checkpoint(tmp_path / work / f"{stage.name}.pt") for work in ("whole", "resumed")
        ]
        assert_same(*ends)
    first = load_checkpoint(tmp_path / "whole" / f"{STAGES[0].name}.pt")
    assert first
    changed = [
        name for name, value in whole.items() if not torch.equal(first["model"][name], value)
    ]
    assert {name.split(".")[0] for name in changed} == {"encoder", "quant_conv"}


@torch.no_grad()
def test_two_large_parts_equal_many_small_ones():
    vae = make_autoencoder().double()
    generator = torch.Generator().manual_seed(0)
    video = 2 * torch.rand(1, 3, 13, 16, 16, generator=generator).double() - 1
    ours, theirs = encode_whole(vae, video), vae.encode(video).latent_dist
    torch.testing.assert_close(ours.parameters, theirs.parameters)
    torch.testing.assert_close(decode_whole(vae, ours.mean), vae.decode(ours.mean).sample)


def test_the_lean_autoencoder_has_the_losses_and_gradients_of_the_whole():
    vae = make_autoencoder()
    half = make_lean_autoencoder(vae)
    video = crops(1, 1, frames=9, device="cpu")[..., :32, :32]
    draws = draw_latents(video, 1)
    losses, gradients = list[torch.Tensor](), list[torch.Tensor]()
    for model in (vae, half.model):
        vae.zero_grad()
        losses.append(autoencoder_losses(model, video, draws))
        losses[-1].sum().backward()
        if model is not vae:
            half.collect_gradients()
        gradients.append(
            torch.cat([p.grad.flatten() for p in vae.parameters() if p.grad is not None])
        )
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-6)
    ours, theirs = gradients
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.99


def test_the_optimizer_updates_all_parameters_and_clears_their_gradients():
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        layers = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3, 2))
    weights = [p for p in layers.parameters() if p.ndim > 1]
    biases = [p for p in layers.parameters() if p.ndim == 1]
    before = [p.detach().clone() for p in layers.parameters()]
    optimizer = Optimizer(weights, biases, muon_lr=0.01, adam_lr=0.01)
    layers(torch.ones(1, 2, 3, 3)).square().sum().backward()
    optimizer.set_rate(0.5)
    optimizer.step()
    distances = [(p - b).abs().amax() for p, b in zip(layers.parameters(), before, strict=True)]
    assert all(distance > 0 for distance in distances)
    optimizer.zero_grad()
    assert all(p.grad is None for p in layers.parameters())


def test_muon_in_batches_equals_muon_on_each_matrix():
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (16, 8), (8, 8), (8, 16), (4, 2, 3, 3)]
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().flatten(1).clone()) for p in ours]
    batched = BatchedMuon(ours, lr=0.1)
    single = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.flatten(1)
        batched.step()
        single.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.flatten(1), b, atol=1e-5, rtol=0)


def test_a_parameter_without_a_gradient_is_unchanged():
    used, idle = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Optimizer([used, idle], [nn.Parameter(torch.ones(2))], muon_lr=0.1, adam_lr=0.1)
    used.sum().backward()
    optimizer.step()
    assert torch.equal(idle, torch.ones(2, 2))
    assert not torch.equal(used, torch.ones(2, 2))


def test_every_word_of_the_world_is_a_token():
    prompts = [*FILLERS, *(synonym for words in SYNONYMS.values() for synonym in words)]
    for template in TEMPLATES:
        for axis, words in (
            ("color", COLORS), ("shape", SHAPES), ("motion", MOTIONS), ("background", BACKGROUNDS)
        ):  # fmt: skip
            blank = {"color": "", "shape": "", "motion": "", "background": ""}
            prompts += [template.format(**(blank | {axis: word})) for word in words]
    tokenizer = make_tokenizer()
    ids, mask = tokenize(tokenizer, prompts)
    assert ids.shape == mask.shape == (len(prompts), TEXT_LENGTH)
    unknown = [
        text for text, row in zip(prompts, ids, strict=True) if tokenizer.unk_token_id in row
    ]
    assert unknown == []


def test_case_is_ignored_and_unknown_words_are_one_token():
    tokenizer = make_tokenizer()
    ids, mask = tokenize(tokenizer, ["a RED circle", "a red circle", "a red hippopotamus", ""])
    assert torch.equal(ids[0], ids[1])
    a, red, unknown, end = ids[2, :4].tolist()
    assert (a, red) == tuple(ids[1, :2].tolist())
    assert (unknown, end) == (tokenizer.unk_token_id, tokenizer.eos_token_id)
    assert mask.sum(1).tolist() == [4, 4, 4, 1]
    assert set(ids[3, 1:].tolist()) == {tokenizer.pad_token_id}


def test_training_the_tiny_decoder_resumes_exactly(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    targets = {
        "latents": torch.randn(6, CHANNELS, 3, 4, 4, generator=generator),
        "video": torch.randint(0, 256, (6, 3, 9, 32, 32), dtype=torch.uint8, generator=generator),
    }
    budget = TinyBudget(clips=6, batch=2, steps=STEPS)
    for name in ("whole", "resumed"):
        work = tmp_path / name
        work.mkdir()
        torch.save(targets, work / "tiny-targets-00000.pt")
    whole = train_tiny_decoder(tmp_path / "whole", make_autoencoder(), budget=budget)
    monkeypatch.setattr(stop, "requested", True)
    with pytest.raises(SystemExit):
        train_tiny_decoder(tmp_path / "resumed", make_autoencoder(), budget=budget)
    monkeypatch.setattr(stop, "requested", False)
    resumed = train_tiny_decoder(tmp_path / "resumed", make_autoencoder(), budget=budget)
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    path = tmp_path / "decoders" / "demo.safetensors"
    write_tiny_decoder(resumed, path)
    assert add_vae_decoder(SPECS["demo"], str(path)).tiny_decoder == DEMO_SHAPE
