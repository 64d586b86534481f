"""Random models: the real classes at their real size, reproducible and finite."""

from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.shapes import inputs, parameters
from wancli.catalog.hf_configs import CLASSES
from wancli.catalog.local import find_spec, spec_of_folder
from wancli.catalog.random import keep_layers
from wancli.catalog.specs import SPECS, ModelSpec
from wancli.catalog.tasks import ANIMATE, ENDS, IMAGE, TASKS, TEXT, VACE, VIDEO, WAN
from wancli.catalog.wan import (
    DEMO,
    Architecture,
    Autoencoder,
    FaceEncoder,
    ImageEncoder,
    TextEncoder,
    Transformer,
)
from wancli.config.settings import Machine
from wancli.cost.wan import part_parameters
from wancli.models.load import load_pipeline, load_vae
from wancli.models.random_weights import byte_tokenizer, fill, random_part

CPU, META = torch.device("cpu"), torch.device("meta")
TINY = Transformer(
    layers=3, heads=2, head_dim=12, ffn=32, in_channels=4, out_channels=4, text_dim=16, freq_dim=16
)
WITH_IMAGE = replace(TINY, in_channels=12, image_dim=8, added_kv=True)
CLIP = ImageEncoder(dim=8, ffn=8, layers=3, heads=2, patch=112)  # 5 tokens per image
SMALL_VAE = Autoencoder(4, 4, 4, (1, 1, 1, 1), 1)
# By task: the transformer, and facts about the model.
TASK_MODELS: dict[str, tuple[Transformer, dict[str, Any]]] = {
    TEXT: (TINY, {"experts": 2, "boundary_ratio": 0.5}),
    VIDEO: (TINY, {}),
    IMAGE: (replace(TINY, in_channels=12), {"experts": 2, "boundary_ratio": 0.5}),
    ENDS: (replace(WITH_IMAGE, image_positions=10), {"image_encoder": True}),
    VACE: (replace(TINY, vace_blocks=2, vace_channels=4 + 4 + 64), {}),
    ANIMATE: (
        replace(WITH_IMAGE, face=FaceEncoder(8, 8, 4, 8, 8, 2, every=3)),
        {"image_encoder": True},
    ),
}


# One of each shape.
NAMES = {s.architecture: s.name for s in SPECS.values() if s.family is WAN}.values()
# One of each kind of transformer.
KINDS = ("wan2.1-t2v-1.3b", "wan2.1-flf2v-14b", "wan2.1-vace-14b", "wan2.2-animate-14b")


def tiny_spec(task: str, **more: Any) -> ModelSpec:
    transformer, facts = TASK_MODELS[task]
    text = TextEncoder(vocabulary=40, dim=16, heads=2, head_dim=8, ffn=16, layers=3)
    shapes = Architecture(transformer, SMALL_VAE, text, CLIP if "image_encoder" in facts else None)
    return ModelSpec(
        f"random:{task}", "", "", (task,), latent_channels=4, architecture=shapes, random=True,
        **{**facts, **more},
    )  # fmt: skip


def picture(seed: int) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3))
    return Image.fromarray(levels.astype("uint8"))


def run_task(pipeline: Any, task: str) -> Any:
    """Latents of one run of the task."""
    clip = [picture(n) for n in range(5)]
    by_task: dict[str, dict[str, Any]] = {
        TEXT: {}, VIDEO: {"video": clip, "strength": 0.5}, IMAGE: {"image": clip[0]},
        ENDS: {"image": clip[0], "last_image": clip[1]}, VACE: {"reference_images": clip[:1]},
        ANIMATE: {"image": clip[0], "pose_video": clip, "face_video": clip,
                  "segment_frame_length": 5},
    }  # fmt: skip
    arguments = by_task[task]
    if task not in (VIDEO, ANIMATE):
        arguments["num_frames"] = 5
    return pipeline(
        prompt="a cat", height=32, width=32, num_inference_steps=3, guidance_scale=2.0,
        generator=torch.Generator().manual_seed(1), output_type="latent", **arguments,
    ).frames  # fmt: skip


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        *((name, 2) for name in KINDS),
        (KINDS[0], None),
        *(pytest.param(name, None, marks=pytest.mark.slow) for name in NAMES),
    ],
)
def test_every_component_has_the_planned_parameters(name: str, layers: int | None):
    spec = find_spec(f"random:{name}", layers=layers)
    for part, planned in part_parameters(spec.wan, spec.experts).items():
        library = transformers if part.endswith("encoder") else diffusers
        kind = getattr(library, CLASSES.get(part, TASKS[spec.tasks[0]].transformer))
        component = random_part(kind, spec, part, dtype=torch.bfloat16, device=META)
        assert (part, parameters(component)) == (part, planned)


@pytest.mark.parametrize(
    ("task", "dtype", "layers"),
    [(task, *(("bfloat16", 3), ("float32", 2))[n % 2]) for n, task in enumerate(TASK_MODELS)],
)
def test_every_task_runs(task: str, dtype: Any, layers: int):
    spec = tiny_spec(task)
    spec = replace(spec, architecture=keep_layers(spec.wan, layers))
    loaded = load_pipeline(spec, Machine(device="cpu", dtype=dtype), task=task)
    latents = run_task(loaded.pipeline, task)
    assert latents.isfinite().all()
    assert 0.1 < latents.float().std() < 10


def test_random_models_are_reproducible_and_experts_differ():
    def weights() -> tuple[Any, Any]:
        pipeline = load_pipeline(tiny_spec(TEXT), Machine(device="cpu")).pipeline
        return pipeline.transformer.state_dict(), pipeline.transformer_2.state_dict()

    (one, other), (again, _) = weights(), weights()
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())
    drawn = [name for name, tensor in one.items() if len(tensor.unique()) > 1]
    assert len(drawn) > len(one) / 3
    assert not any(torch.equal(one[name], other[name]) for name in drawn)


@pytest.mark.parametrize(
    ("task", "dtype"), [(TEXT, "float32"), (VACE, "bfloat16"), (ANIMATE, "bfloat16")]
)
def test_random_components_match_those_loaded_from_files(task: str, dtype: Any, tmp_path):
    machine = Machine(device="cpu", dtype=dtype)
    random = load_pipeline(tiny_spec(task), machine, task=task).pipeline
    random.save_pretrained(tmp_path)
    read = load_pipeline(spec_of_folder(tmp_path), machine, task=task).pipeline
    for name in ("transformer", "vae", "text_encoder", "image_encoder"):
        if random.components.get(name) is None:
            continue
        one, other = getattr(random, name), getattr(read, name)
        for kind in ("named_parameters", "named_buffers"):
            ours, theirs = dict(getattr(one, kind)()), dict(getattr(other, kind)())
            assert {k: x.dtype for k, x in ours.items()} == {k: x.dtype for k, x in theirs.items()}
            assert all(torch.equal(x, theirs[k]) for k, x in ours.items())
        assert not one.training


def test_a_vae_loaded_alone_equals_that_of_the_pipeline():
    spec = tiny_spec(TEXT)
    vae, _ = load_vae(spec, Machine(device="cpu"))
    whole = load_pipeline(spec, Machine(device="cpu")).pipeline.vae
    assert all(torch.equal(x, y) for x, y in zip(vae.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_keep_their_scale_through_forty_blocks(dtype: torch.dtype):
    shape = replace(TINY, layers=40, heads=8)
    spec = replace(tiny_spec(TEXT), architecture=Architecture(shape, DEMO.vae))
    kind = diffusers.WanTransformer3DModel
    model = random_part(kind, spec, "transformer", dtype=dtype, device=CPU)
    drawn = torch.Generator().manual_seed(0)
    arguments = {
        k: torch.randn(x.shape, generator=drawn).to(dtype) for k, x in inputs(shape).items()
    }
    with torch.no_grad():
        velocity = model(**{**arguments, "timestep": torch.tensor([500.0])}).sample
    assert 0.1 < velocity.float().std() < 10


def test_creating_a_model_leaves_no_state_in_torch():
    state, dtype = torch.random.get_rng_state(), torch.get_default_dtype()
    load_pipeline(tiny_spec(TEXT), Machine(device="cpu", dtype="bfloat16"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype


def test_weights_are_random_norms_ones_and_biases_zero():
    linear, norm = torch.nn.Linear(64, 3), torch.nn.LayerNorm(3)
    model = torch.nn.Sequential(linear, norm).requires_grad_(False)
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    fill(model, seed=1)
    assert linear.weight.std().item() == pytest.approx(64**-0.5, rel=0.2)
    assert norm.weight.tolist() == [1, 1, 1]
    assert linear.bias.tolist() == norm.bias.tolist() == [0, 0, 0]


@pytest.mark.gpu
def test_a_quantized_model_has_the_weights_of_a_whole_one():
    pytest.importorskip("torchao", reason="pip install torchao")
    spec = find_spec("random:demo")
    whole, small = (
        load_pipeline(spec, Machine(device="cuda", quantize=kind)).pipeline.transformer
        for kind in ("none", "int8")
    )
    assert torch.equal(whole.proj_out.weight, small.proj_out.weight)


def test_every_byte_is_one_token():
    spec = find_spec("random:wan2.1-t2v-1.3b")
    tokenizer = byte_tokenizer(spec)
    ids = tokenizer("a cat 色").input_ids
    assert len(ids) == len("a cat 色".encode()) + 1
    assert tokenizer.unk_token_id not in ids
    assert ids[-1] == tokenizer.eos_token_id
    assert byte_tokenizer(spec)("a cat 色").input_ids == ids
    assert tokenizer.model_max_length == 512
    small = byte_tokenizer(find_spec("random:demo"))
    assert max(small("a cat 色~ÿ").input_ids) < 74
    assert small.unk_token_id not in small("cat").input_ids
