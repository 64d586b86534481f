"""Prompt K/V: computing a prompt once is bit-identical to computing it in every step."""

import gc
from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest
import torch
from accelerate import cpu_offload  # type: ignore[import-untyped]
from diffusers import WanAnimateTransformer3DModel, WanTransformer3DModel, WanVACETransformer3DModel
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn
from torch._inductor.compile_fx import compile_fx

from tests.fakes import tiny_pipeline
from wancli.caching.lru import CacheKey, LRUCache
from wancli.caching.prompt_attention import WeightOffloader
from wancli.caching.prompt_kv import MAX_PROMPTS, PromptKVCache, prompt_kv
from wancli.catalog.wan import TIMESTEP_ROWS

CPU = torch.device("cpu")
SIZES = {
    "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16,
    "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 64,
}  # fmt: skip
WITH_IMAGE = {"image_dim": 6, "added_kv_proj_dim": 24}


def build(kind=WanTransformer3DModel, *, seed=0, **sizes):
    """A tiny transformer in which every weight has an effect."""
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)  # diffusers takes no generator
        model = kind(**{**SIZES, "in_channels": 4, "out_channels": 4, **sizes}).eval()
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.3)
    return model.requires_grad_(False)


def animate():
    return build(
        WanAnimateTransformer3DModel, **WITH_IMAGE, in_channels=12, latent_channels=4, num_layers=5,
        motion_encoder_size=16, motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_style_dim=8, motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=8,
        face_encoder_num_heads=2, motion_encoder_batch_size=2,
    )  # fmt: skip


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(seed, tokens=7):
    return draw(1, tokens, 16, seed=seed)


def image(seed, count=3):
    return draw(count, 5, 6, seed=seed)


def steps(model, *branches, frames=3, count=3, **same):
    """Velocities of `count` steps, with all branches in each."""
    shape = (1, model.config.in_channels, frames, 4, 4)
    return [
        model(
            draw(*shape, seed=step).to(model.dtype),
            torch.tensor([900.0 - 300.0 * step]),
            **{**same, **branch},
            return_dict=False,
        )[0]
        for step in range(count)
        for branch in branches
    ]


def with_text(seed, **more):
    return {"encoder_hidden_states": text(seed, **more)}


def with_image(seed):
    return {**with_text(seed, tokens=512), "encoder_hidden_states_image": image(9, count=1)}


def equal(ours, theirs):
    return len(ours) == len(theirs) > 0 and all(map(torch.equal, ours, theirs))


@contextmanager
def counted(model):
    """Counts the calls of each module of the stock model; enter it before `prompt_kv`."""
    calls: Counter[str] = Counter()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, module in model.named_modules()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def counts(calls, model, *ends):
    """The distinct call counts of all modules with such a name."""
    return {calls[name] for name, _ in model.named_modules() if name.endswith(ends)}


def run(pipeline, *, seed=0, prompt="a red circle", side=32):
    """Latents of a stock pipeline, guided."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt, negative_prompt="blue", height=side, width=side, num_frames=5,
        num_inference_steps=3, guidance_scale=4.0, max_sequence_length=16, output_type="latent",
        generator=torch.Generator().manual_seed(seed),
    ).frames  # fmt: skip


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


CROSS_KV = ("attn2.to_k", "attn2.to_v", "attn2.norm_k")


def test_a_stock_pipeline_gives_the_same_video_and_computes_each_prompt_once():
    pipeline = tiny_pipeline()
    model = pipeline.transformer

    def videos():
        return [run(pipeline), run(pipeline, seed=1), run(pipeline, prompt="a blue circle")]

    plain = videos()
    with counted(model) as calls, prompt_kv(model, PromptKVCache()):
        ours = videos()
    assert equal(ours, plain)
    assert not torch.equal(plain[0], plain[1])
    assert not torch.equal(plain[0], plain[2])
    assert calls["blocks.0"] == 3 * 3 * 2
    assert counts(calls, model, *CROSS_KV, "text_embedder") == {3}  # two prompts, one negative one
    assert counts(calls, model, "rope") == {1}


def test_two_experts_each_cache_the_prompt():
    pipeline = tiny_pipeline(experts=2)
    plain = run(pipeline)
    cache, (high, low) = PromptKVCache(), (pipeline.transformer, pipeline.transformer_2)
    with (
        counted(high) as first, counted(low) as second,
        prompt_kv(high, cache), prompt_kv(low, cache),
    ):  # fmt: skip
        ours = run(pipeline)
    assert torch.equal(ours, plain)
    for calls, model in ((first, high), (second, low)):
        assert calls["blocks.0"] >= 2
        assert counts(calls, model, *CROSS_KV, "text_embedder") == {2}


def vace():
    model = build(WanVACETransformer3DModel, vace_layers=[0, 1], vace_in_channels=8)
    return model, {"control_hidden_states": draw(1, 8, 3, 4, 4, seed=5)}


def test_image_to_video_computes_an_image_once_for_both_branches():
    model = build(**WITH_IMAGE)
    plain = steps(model, with_image(1), with_image(2))
    with counted(model) as calls, prompt_kv(model, PromptKVCache()):
        assert equal(steps(model, with_image(1), with_image(2)), plain)
    assert counts(calls, model, *CROSS_KV) == {2}
    assert counts(calls, model, "add_k_proj", "add_v_proj", "norm_added_k", "image_embedder") == {1}


def test_first_and_last_frame_to_video_caches_both_images():
    model = build(**WITH_IMAGE, pos_embed_seq_len=10)
    images = {"encoder_hidden_states_image": image(9, count=2)}  # 2 x 5 tokens
    branches = [{**with_text(seed, tokens=512), **images} for seed in (1, 2)]
    plain = steps(model, *branches)
    with counted(model) as calls, prompt_kv(model, PromptKVCache()):
        assert equal(steps(model, *branches), plain)
    assert counts(calls, model, "add_k_proj", "image_embedder") == {1}


def test_another_image_with_the_same_prompt_is_detected():
    model, branch = build(**WITH_IMAGE), with_image(1)
    other = {**branch, "encoder_hidden_states_image": image(10, count=1)}
    plain = steps(model, branch, other)
    with prompt_kv(model, PromptKVCache()):
        assert equal(steps(model, branch, other), plain)
    assert not torch.equal(plain[0], plain[1])


@pytest.mark.parametrize(
    "branch", [with_text(1, tokens=512), {**with_image(1), **with_text(1, tokens=510)}]
)
def test_text_that_diffusers_would_mistake_for_an_image_is_rejected(branch):
    model = build(**WITH_IMAGE)
    with prompt_kv(model, PromptKVCache()), pytest.raises(ValueError, match=r"image"):
        steps(model, branch)


def test_vace_blocks_are_cached_too():
    model, control = vace()
    plain = steps(model, with_text(1), with_text(2), **control)
    with counted(model) as calls, prompt_kv(model, PromptKVCache()):
        assert equal(steps(model, with_text(1), with_text(2), **control), plain)
    assert calls["vace_blocks.1"] == 3 * 2
    assert counts(calls, model, *CROSS_KV, "text_embedder") == {2}


POSE = {"pose_hidden_states": draw(1, 4, 2, 4, 4, seed=5)}
WITH_FACE = {**POSE, "face_pixel_values": draw(1, 3, 5, 16, 16, seed=6)}
FACES = ("motion_encoder.conv_out", "face_encoder", "face_adapter.0.to_k", "face_adapter.0.norm_k")


def test_animate_encodes_a_face_video_once():
    model, faces = animate(), WITH_FACE["face_pixel_values"]
    cond = {**with_image(1), "face_pixel_values": faces}

    def frames(count=2):
        out = []
        for _ in range(count):  # as the pipeline does: a new tensor of the same values each step
            blank = {**with_image(2), "face_pixel_values": faces * 0 - 1}
            out += steps(model, cond, blank, **POSE)
        return out

    plain = frames()
    with counted(model) as calls, prompt_kv(model, PromptKVCache()):
        assert equal(frames(), plain)
    assert counts(calls, model, *CROSS_KV) == {2}
    # 5 frames in batches of 2, 2 and 1; of the blank ones the first two are the same
    assert {name: calls[name] for name in FACES} == dict(zip(FACES, (3 + 2, 2, 2, 2), strict=True))


def test_another_or_overwritten_face_video_is_detected():
    model, same = animate(), {**POSE, **with_image(1)}

    def frames():
        first, second = (draw(1, 3, 5, 16, 16, seed=seed) for seed in (6, 7))
        out = steps(model, *({"face_pixel_values": f} for f in (first, second)), **same)
        first[:, :, -1] = 0.5
        return out + steps(model, {"face_pixel_values": first}, **same)

    plain = frames()
    with prompt_kv(model, PromptKVCache()):
        assert equal(frames(), plain)
    assert not torch.equal(plain[0], plain[1])
    assert not torch.equal(plain[0], plain[6])


def test_overwritten_embeddings_are_detected():
    model = build()

    def edited(mode):
        with mode():
            prompt = text(1)
            before = steps(model, {"encoder_hidden_states": prompt})
            prompt[:, 2] += 1.0
            return before + steps(model, {"encoder_hidden_states": prompt})

    for mode in (nullcontext, torch.inference_mode):
        plain = edited(mode)
        with counted(model) as calls, prompt_kv(model, PromptKVCache()):
            assert equal(edited(mode), plain)
        assert not torch.equal(plain[0], plain[3])
        assert counts(calls, model, *CROSS_KV, "text_embedder") == {2}


def test_entries_are_shared_between_inference_mode_and_outside():
    model, prompt = build(), with_text(1)
    plain = steps(model, prompt)
    for first, second in ((torch.inference_mode, nullcontext), (nullcontext, torch.inference_mode)):
        with counted(model) as calls, prompt_kv(model, PromptKVCache()):
            for mode in (first, second):
                with mode():
                    assert equal(steps(model, prompt), plain)
        assert counts(calls, model, *CROSS_KV) == {1}


def test_a_cache_can_be_reused():
    model, cache = build(), PromptKVCache()
    plain = steps(model, with_text(1))
    for expected in (1, 0):
        with counted(model) as calls, prompt_kv(model, cache):
            assert equal(steps(model, with_text(1)), plain)  # equal embeddings in another tensor
        assert counts(calls, model, *CROSS_KV) == {expected}


def test_an_equal_tensor_is_recognized_by_identity_the_next_time():
    lru, first, second = LRUCache(), text(1), text(1)
    entry = lru.get([first], 2, [])
    assert not entry.keys[0].is_same(second)
    assert lru.get([second], 2, []) is entry
    assert entry.keys[0].is_same(second)  # without synchronizing the device


def test_its_size_is_that_of_keys_values_and_embeddings_and_is_bounded():
    model, cache = build(), PromptKVCache()
    blocks, tokens, dim, size = 2, 7, 24, 4
    with prompt_kv(model, cache):
        for seed in range(MAX_PROMPTS + 3):
            steps(model, with_text(seed))
            cached = min(seed + 1, MAX_PROMPTS)
            assert cache.nbytes == cached * (2 * blocks + 1) * tokens * dim * size


def test_the_least_recently_used_prompt_is_evicted_first():
    model = build()
    with counted(model) as calls, prompt_kv(model, PromptKVCache()):
        for seed in [*range(MAX_PROMPTS), 0, MAX_PROMPTS, 0]:
            steps(model, with_text(seed))
    assert counts(calls, model, *CROSS_KV) == {MAX_PROMPTS + 1}


def test_a_deleted_transformer_is_not_kept_alive():
    model, cache = build(), PromptKVCache()
    with prompt_kv(model, cache):
        steps(model, with_text(1))
    assert cache.nbytes > 0
    del model
    gc.collect()
    assert cache.nbytes == 0


def scaled(model):
    model.blocks[1].attn2.to_v.weight.mul_(1.5)


def replaced(model):  # as a LoRA is loaded
    old = model.blocks[1].attn2.to_v
    model.blocks[1].attn2.to_v = nn.Linear(old.in_features, old.out_features).requires_grad_(False)
    model.blocks[1].attn2.to_v.load_state_dict({k: v * 2 for k, v in old.state_dict().items()})


def fused(model):
    for block in model.blocks:
        block.attn2.fuse_projections()


@pytest.mark.parametrize("change", [scaled, replaced, fused])
def test_changed_projections_invalidate_the_cache(change):
    model, cache = build(), PromptKVCache()
    with counted(model) as calls, prompt_kv(model, cache):
        before = steps(model, with_text(1))
        change(model)
        ours = steps(model, with_text(1))
    assert equal(ours, steps(model, with_text(1)))
    assert change is fused or not equal(ours, before)
    assert calls["blocks.0.attn2.norm_k"] == 2


@pytest.mark.parametrize(
    ("make_model", "with_prompt", "more"),
    [
        (build, with_text, {}),
        (lambda: build(**WITH_IMAGE), with_image, {}),
        (animate, with_image, WITH_FACE),
    ],
    ids=["text", "image", "face"],
)
def test_fused_projections_are_cached_too(make_model, with_prompt, more):
    model = make_model()
    model.fuse_qkv_projections()
    plain = steps(model, with_prompt(1), with_prompt(2), **more)
    cache = PromptKVCache()
    with counted(model) as calls, prompt_kv(model, cache):
        assert equal(steps(model, with_prompt(1), with_prompt(2), **more), plain)
    assert counts(calls, model, "attn2.to_kv") == {2}
    assert counts(calls, model, "attn2.to_added_kv") == (
        {1} if with_prompt is with_image else set()
    )
    assert counts(calls, model, "face_adapter.0.to_kv") == ({1} if more else set())
    values = [kv.value for entry in cache.of(model).text.entries for kv in entry.blocks]
    for value in values:  # a copy, not a view of keys and values together
        assert value is not None
        assert value.untyped_storage().nbytes() == value.nbytes


def test_the_attention_backend_is_kept(monkeypatch):
    model, used = build(), []
    for block in model.blocks:  # the model's own method would set it globally
        block.attn2.set_attention_backend("_native_math")
    plain = steps(model, with_text(1))
    math = AttentionBackendName._NATIVE_MATH
    kernel = _AttentionBackendRegistry._backends[math]

    def seen(**inputs):
        used.append(inputs["key"].shape[1])
        return kernel(**inputs)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, math, seen)
    with prompt_kv(model, PromptKVCache()):
        assert equal(steps(model, with_text(1)), plain)
    assert used == [7] * 3 * 2  # every cross-attention, with the prompt's tokens


@pytest.mark.parametrize("with_prompt", [with_text, with_image])
def test_padding_is_masked(with_prompt):
    model = build(**({} if with_prompt is with_text else WITH_IMAGE)).double()
    branches = [{k: v.double() for k, v in with_prompt(seed).items()} for seed in (1, 2)]
    plain = steps(model, *branches)
    cache = PromptKVCache()
    with prompt_kv(model, cache, align=16):
        ours = steps(model, *branches)
    assert max((a - b).abs().max().item() for a, b in zip(ours, plain, strict=True)) < 1e-12
    entries = [entry for lru in cache.of(model) for entry in lru.entries]
    keys = [kv.key for entry in entries for kv in entry.blocks]
    tokens = {key.shape[1] for key in keys if key is not None}
    assert tokens == ({16} if with_prompt is with_text else {512, 16})


def test_a_timestep_shared_by_all_tokens_is_embedded_in_a_few_rows():
    pipeline = tiny_pipeline()
    pipeline.register_to_config(expand_timesteps=True)
    model, rows = pipeline.transformer, []

    def see(_module, inputs):
        rows.append(inputs[0].shape[1])

    plain = run(pipeline, side=256)
    hook = model.condition_embedder.time_proj.register_forward_pre_hook(see)
    with prompt_kv(model, PromptKVCache()):
        assert torch.equal(run(pipeline, side=256), plain)
    with prompt_kv(model, PromptKVCache(), uniform_timesteps=True):
        assert torch.equal(run(pipeline, side=256), plain)
    hook.remove()
    assert rows == [2 * 16 * 16] * 6 + [TIMESTEP_ROWS] * 6


def test_a_single_timestep_is_accepted_as_uniform():
    model = build()
    plain = steps(model, with_text(1))
    with prompt_kv(model, PromptKVCache(), uniform_timesteps=True):
        assert equal(steps(model, with_text(1)), plain)


def sequential(model):
    cpu_offload(model, execution_device=CPU)


def leaf(model):
    apply_group_offloading(model, CPU, CPU, offload_type="leaf_level")


def block(model):
    apply_group_offloading(model, CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


@pytest.mark.parametrize(
    ("offload", "first"), [(sequential, True), (leaf, False), (block, True), (block, False)]
)
def test_offloaded_weights_are_loaded_when_needed(offload, first):
    model = build(**WITH_IMAGE)
    plain = steps(model, with_image(1), with_image(2))
    if first:
        offload(model)
    with counted(model) as calls, prompt_kv(model, PromptKVCache()):
        if not first:
            offload(model)
        assert equal(steps(model, with_image(1), with_image(2)), plain)
        assert counts(calls, model, "blocks.0.attn2.to_k") == {2}
    assert equal(steps(model, with_image(1), with_image(2)), plain)


def test_unused_weights_are_offloaded_and_restored():
    model, first, second = build(**WITH_IMAGE), with_image(1), with_image(2)
    second["encoder_hidden_states_image"] = image(10, count=1)
    plain = steps(model, first), steps(model, second)
    attn = model.blocks[1].attn2
    weights = (attn.to_k.weight, attn.to_v.bias, attn.add_v_proj.weight)
    before = [(w.data_ptr(), w.clone()) for w in weights]
    total = 2 * 4 * (24 * 24 + 24) * 4  # blocks, projections, weight and bias, bytes
    with prompt_kv(model, PromptKVCache(), offload_to=CPU) as offloaders:

        def freed():
            return sum(offloader.nbytes for offloader in offloaders), {w.numel() for w in weights}

        assert equal(steps(model, first), plain[0])
        assert freed() == (total, {0})
        assert equal(steps(model, second, count=1), plain[1][:1])  # restored to fill the cache
        assert freed()[0] == 0
        assert equal(steps(model, first, second)[1::2], plain[1])
        assert freed() == (total, {0})
    assert [(w.data_ptr(), True) for w in weights] == [
        (pointer, torch.equal(w, old)) for w, (pointer, old) in zip(weights, before, strict=True)
    ]
    assert equal(steps(model, second), plain[1])


@pytest.mark.parametrize("offload_to", [None, CPU])
@pytest.mark.parametrize("with_face", [False, True])
def test_the_transformer_is_restored_even_after_an_error(offload_to, with_face):
    model, more = (animate(), {**with_image(1), **WITH_FACE}) if with_face else (build(), {})
    processors, modules = dict(model.attn_processors), dict(model.named_modules())
    weights = {name: weight.data_ptr() for name, weight in model.named_parameters()}

    def fail(*_):
        raise MemoryError

    def use():
        with prompt_kv(model, PromptKVCache(), uniform_timesteps=True, offload_to=offload_to):
            steps(model, {**more, **with_text(1, tokens=512)})
            assert dict(model.named_modules()) != modules
            model.blocks[1].ffn.register_forward_pre_hook(fail)
            steps(model, {**more, **with_text(2, tokens=512)})

    with pytest.raises(MemoryError):
        use()
    assert (dict(model.attn_processors), dict(model.named_modules())) == (processors, modules)
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == weights


def test_weights_that_cannot_be_brought_back_are_not_lost(monkeypatch):
    modules = [nn.Linear(2, 2) for _ in range(2)]
    weights = [weight for module in modules for weight in module.parameters()]
    before = [weight.data.clone() for weight in weights]
    offloader, real, moved = WeightOffloader(CPU), torch.Tensor.to, []
    offloader.offload(modules)
    assert {weight.numel() for weight in weights} == {0}

    def run_out(tensor, device):
        moved.append(tensor)
        if len(moved) == 2:
            raise torch.OutOfMemoryError
        return real(tensor, device)

    monkeypatch.setattr(torch.Tensor, "to", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        offloader.restore()
    assert equal(weights, before)
    assert offloader.nbytes == 0


def test_a_failed_forward_does_not_corrupt_the_cache():
    model = animate()
    plain = steps(model, with_image(1), **WITH_FACE)

    def fail(*_):
        raise MemoryError

    with prompt_kv(model, PromptKVCache()):
        for part in (model.motion_encoder, model.face_adapter[0], model.blocks[1].ffn):
            hook = part.register_forward_hook(fail)
            with pytest.raises(MemoryError):
                steps(model, with_image(1), **WITH_FACE)
            hook.remove()
        assert equal(steps(model, with_image(1), **WITH_FACE), plain)


def test_prompt_kv_cannot_be_nested():
    model = build()
    with prompt_kv(model, PromptKVCache()):
        before = dict(model.attn_processors)
        with (
            pytest.raises(RuntimeError, match="entered once"),
            prompt_kv(model, PromptKVCache()),
        ):
            pass
        assert dict(model.attn_processors) == before


def test_latents_of_another_shape_get_their_own_rotary_table():
    model = build()
    plain = [steps(model, with_text(1), frames=frames) for frames in (3, 2, 3)]
    with counted(model) as calls, prompt_kv(model, PromptKVCache()):
        ours = [steps(model, with_text(1), frames=frames) for frames in (3, 2, 3)]
    assert all(map(equal, ours, plain))
    assert calls["rope"] == 2


def compile_and_run(model, backend):
    """Velocities without and with `prompt_kv`, and the graphs compiled for each."""
    torch.compiler.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward if backend == "eager" else compile_fx(graph, inputs)

    model.compile_repeated_blocks(fullgraph=True, backend=counting)
    plain, alone = steps(model, with_text(1), with_text(2), with_text(3)), len(graphs)
    with prompt_kv(model, PromptKVCache(), offload_to=CPU):
        ours = steps(model, with_text(1), with_text(2), with_text(3))
    return plain, ours, alone, len(graphs) - alone


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_share_a_graph(backend):
    plain, ours, alone, added = compile_and_run(build(num_layers=5), backend)
    if backend == "eager":
        assert equal(ours, plain)
    torch.testing.assert_close(ours, plain)  # the cache is filled uncompiled, before the blocks
    assert (alone, added) == (1, 1)


@pytest.mark.parametrize("with_face", [False, True])
def test_cache_hits_compare_no_values(monkeypatch, with_face):
    model, branch = animate() if with_face else build(**WITH_IMAGE), with_image(1)
    more = WITH_FACE if with_face else {}

    def wait(*_):
        raise AssertionError("a CUDA graph cannot wait for a comparison")

    with prompt_kv(model, PromptKVCache()):
        filled = steps(model, branch, **more)
        monkeypatch.setattr(CacheKey, "is_equal", wait)
        assert equal(steps(model, branch, **more), filled)


@pytest.mark.gpu
def test_a_step_is_replayed_as_a_cuda_graph():
    model = build().cuda()
    cond, uncond = (text(seed).cuda() for seed in (1, 2))
    latents, timestep = torch.zeros(1, 4, 3, 4, 4).cuda(), torch.zeros(1).cuda()

    def step():
        velocities = [model(latents, timestep, t, return_dict=False)[0] for t in (cond, uncond)]
        return velocities[1] + 4.0 * (velocities[0] - velocities[1])

    def set_inputs(index):
        latents.copy_(draw(1, 4, 3, 4, 4, seed=index))
        timestep.fill_(900.0 - 100.0 * index)

    plain = []
    for index in range(3):
        set_inputs(index)
        plain.append(step())
    cache = PromptKVCache()
    with prompt_kv(model, cache):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()  # fills
            step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            velocity = step()
        nbytes = cache.nbytes
        for index, expected in enumerate(plain):
            set_inputs(index)
            graph.replay()
            assert torch.equal(velocity, expected)
        assert cache.nbytes == nbytes
