"""Reference latents of causal models, made by running their authors' own loops on a CPU.

    python -m tests.parity.authors MODEL CHECKOUT

MODEL is a key of `MODELS`, CHECKOUT a clone of its repository at the commit that README.md names.
Writes authors_MODEL.safetensors: the last chunk of each case in authors.json, which depends on all
chunks before it. Nothing of the loops is changed; around them, these are replaced:

- packages that the loops import and do not use here (tokenizers, VAE, T5, servers) by empty ones;
- flash attention by `scaled_dot_product_attention` in the input's dtype;
- the text encoder by the stored embeddings, the VAE by nothing; Krea's by one that repeats latents
  as pixels, in float16, and encodes a picture as its channels in reverse;
- random numbers by the stored ones, in the order in which they are drawn;
- the sizes of Wan at 480x832, which they hard-code, by those of the tiny model;
- devices named "cuda" by the CPU, bfloat16 by float32, compiled flex attention by itself.
"""

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

HERE = Path(__file__).parent
Case = dict[str, Any]
Run = Callable[[Case], Any]  # latents [F, C, H, W]
CASES: dict[str, Case] = json.loads((HERE / "authors.json").read_text())
MODEL = json.loads((HERE / "model.json").read_text())
TOKENS, TEXT = MODEL["tokens_per_frame"], MODEL["text_len"]
HEADS, HEAD_DIM, LAYERS = 4, 16, 3
CUT = "The scene transitions. "  # of LongLive 2
MEMORY = (  # of their demo_utils.memory or utils.memory
    "gpu",
    "get_cuda_free_memory_gb",
    "DynamicSwapInstaller",
    "move_model_to_device_with_memory_preservation",
    "log_gpu_memory",
)


def inputs() -> dict[str, torch.Tensor]:
    return {name: t.float() for name, t in load_file(HERE / "inputs.safetensors").items()}


def stub(name: str, path: Path | None = None, **members: Any) -> None:
    """A module with these members, or a package whose own `__init__` is not run."""
    module = ModuleType(name)
    module.__dict__.update(members)
    if path:
        module.__path__ = [str(path)]
    sys.modules[name] = module


def without_encoders(modules: str) -> None:
    members = {"tokenizers": "HuggingfaceTokenizer", "vae": "_video_vae", "t5": "umt5_xxl"}
    for name, member in members.items():
        stub(f"{modules}.{name}", **{member: None})


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
    mixed = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return mixed.transpose(1, 2).contiguous()


def use_sdpa(modules: str) -> None:
    """Import their attention first, so that the others import its replacements."""
    attention: Any = import_module(f"{modules}.attention")
    attention.flash_attention = attention.attention = sdpa


class Embeddings(torch.nn.Module):
    """The prompts are names of stored embeddings."""

    def __init__(self, stored: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.stored = stored

    def forward(self, text_prompts: list[str]) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": self.stored[text_prompts[0]]}


class Anything:
    """Whatever a server's module does as it is imported."""

    def __call__(self, *args: Any, **_: Any) -> Any:
        return args[0] if args and callable(args[0]) else self

    def __getattr__(self, name: str) -> Any:
        return self


class NoVae(torch.nn.Module):
    """Latents are the pixels."""

    def decode_to_pixel(self, x: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        return x

    decode_to_pixel_chunk = decode_to_pixel


def kv_caches(frames: int, *, plain_ints: bool = False) -> list[dict[str, Any]]:
    """Empty caches of every block, as all of these loops lay them out."""

    def index() -> Any:
        return 0 if plain_ints else torch.tensor([0])

    def rows() -> torch.Tensor:
        return torch.zeros(1, frames * TOKENS, HEADS, HEAD_DIM)

    ends = ("global_end_index", "local_end_index")
    return [{"k": rows(), "v": rows()} | {name: index() for name in ends} for _ in range(LAYERS)]


def text_caches() -> list[dict[str, Any]]:
    def rows() -> torch.Tensor:
        return torch.zeros(1, TEXT, HEADS, HEAD_DIM)

    return [{"k": rows(), "v": rows(), "is_init": False} for _ in range(LAYERS)]


@contextmanager
def stored_noise(renoise: torch.Tensor) -> Iterator[None]:
    """Draw the stored tensors, and put what is for CUDA on the CPU."""
    position, names = 0, ("randn_like", "ones")
    before = {name: getattr(torch, name) for name in names}

    def randn_like(like: torch.Tensor) -> torch.Tensor:
        nonlocal position
        position += len(like)
        drawn = renoise[position - len(like) : position]
        assert drawn.shape == like.shape
        return drawn

    def ones(*args: Any, device: Any = None, **more: Any) -> Any:
        return before["ones"](*args, device="cpu" if device == "cuda" else device, **more)

    for name, function in zip(names, (randn_like, ones), strict=True):
        setattr(torch, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(torch, name, function)


@dataclass
class Loop:
    """One repository, imported. `modules` is the package of Wan's blocks."""

    checkout: Path
    modules: str = "wan.modules"
    model: str = "causal_model"
    stored: dict[str, torch.Tensor] = field(default_factory=inputs)

    def packages(self, *names: str) -> None:
        for name in names:
            stub(name, self.checkout / name.replace(".", "/"))

    def blocks(self, **settings: Any) -> Any:
        """Their transformer with the tiny weights; `sink_size`, `local_attn_size` in frames."""
        module: Any = import_module(f"{self.modules}.{self.model}")
        model = module.CausalWanModel(**MODEL["original_CausalWanModel_kwargs"], **settings).eval()
        weights = load_file(HERE / "weights_original_names.safetensors")
        model.load_state_dict({name: w.float() for name, w in weights.items()}, strict=True)
        local = settings.get("local_attn_size", -1)
        for block in model.blocks:
            block.self_attn.max_attention_size = 10**6 if local == -1 else local * TOKENS
        return model

    def generator(self, wrapper: Any, scheduler: Any, *, shift: float, **settings: Any) -> Any:
        """Their wrapper of it, without the released weights."""
        generator = wrapper.__new__(wrapper)
        torch.nn.Module.__init__(generator)
        generator.model, generator.uniform_timestep = self.blocks(**settings), False
        generator.scheduler = scheduler(shift=shift, sigma_min=0.0, extra_one_step=True)
        generator.scheduler.set_timesteps(1000, training=True)
        generator.seq_len = 32760
        generator.post_init()
        return generator


def self_forcing_packages(loop: Loop) -> None:
    """Of repositories that began as Self-Forcing's."""
    loop.packages("wan", "wan.modules", "wan.utils", "pipeline", "utils")
    without_encoders(loop.modules)
    use_sdpa(loop.modules)


def causal_forcing(checkout: Path) -> Run:
    """CausalInferencePipeline of thu-ml/Causal-Forcing."""
    loop = Loop(checkout)
    self_forcing_packages(loop)
    stub("demo_utils")
    stub("demo_utils.memory", **dict.fromkeys(MEMORY))
    wrapper: Any = import_module("utils.wan_wrapper")
    pipeline: Any = import_module("pipeline.causal_inference")

    def run(case: Case) -> Any:
        args = SimpleNamespace(independent_first_frame=False, **case["config"])
        generator = loop.generator(
            wrapper.WanDiffusionWrapper, wrapper.FlowMatchScheduler, shift=case["shift"]
        )
        loops = pipeline.CausalInferencePipeline(
            args, "cpu", generator, Embeddings(loop.stored), NoVae()
        )
        loops.num_transformer_blocks, loops.frame_seq_length = LAYERS, TOKENS
        context, frames = case.get("context_frames", 0), case["frames"]
        loops.kv_cache1, loops.crossattn_cache = kv_caches(context + frames), text_caches()
        _, latents = loops.inference(
            loop.stored["noise"][None, :frames],
            ["prompt_embeds"],
            initial_latent=loop.stored["initial_latent"][None, :context] if context else None,
            return_latents=True,
        )
        return latents[0]

    return run


def longlive(checkout: Path) -> Run:
    """InteractiveCausalInferencePipeline of NVlabs/LongLive, which changes prompts."""
    loop = Loop(checkout)
    self_forcing_packages(loop)
    stub("utils.memory", **dict.fromkeys(MEMORY))
    stub("utils.debug_option", DEBUG=False)
    wrapper: Any = import_module("utils.wan_wrapper")
    pipeline: Any = import_module("pipeline.interactive_causal_inference")

    def run(case: Case) -> Any:
        window = case["config"]["model_kwargs"]
        args = SimpleNamespace(**{**case["config"], "model_kwargs": SimpleNamespace(**window)})
        loop.model = f"causal_model{'_infinity' if window['use_infinite_attention'] else ''}"
        generator = loop.generator(
            wrapper.WanDiffusionWrapper,
            wrapper.FlowMatchScheduler,
            shift=window["timestep_shift"],
            local_attn_size=window["local_attn_size"],
            sink_size=window["sink_size"],
        )
        loops = pipeline.InteractiveCausalInferencePipeline(
            args, "cpu", generator=generator, text_encoder=Embeddings(loop.stored), vae=NoVae()
        )
        loops.num_transformer_blocks, loops.frame_seq_length = LAYERS, TOKENS
        loops.kv_cache1 = kv_caches(window["local_attn_size"])
        loops.crossattn_cache = text_caches()
        loops._initialize_kv_cache = loops._initialize_crossattn_cache = lambda *_, **__: None
        _, latents = loops.inference(
            loop.stored["noise"][None, : case["frames"]],
            text_prompts_list=[["prompt_embeds"], *([name] for name in case["prompts"].values())],
            switch_frame_indices=[int(frame) for frame in case["prompts"]],
            return_latents=True,
        )
        return latents[0]

    return run


def krea(checkout: Path) -> Run:
    """GenerationSession of krea-ai/realtime-video, which recomputes its cache before each chunk."""
    loop = Loop(checkout)
    import_module("diffusers.models.modeling_utils")  # looks for the real torchvision
    servers = {
        "dotenv": ["load_dotenv"],
        "omegaconf": ["OmegaConf"],
        "fastapi": ["FastAPI", "WebSocket", "WebSocketDisconnect", "UploadFile", "File"],
        "fastapi.middleware.cors": ["CORSMiddleware"],
        "fastapi.responses": ["HTMLResponse", "JSONResponse"],
        "msgpack": ["packb", "unpackb"],
        "requests": [],
        "torchvision.transforms.functional": [],
        "settings": ["MODEL_FOLDER"],
        "v2v": ["encode_video_latent"],
    }
    for name, members in servers.items():
        for package in (name[: match.start()] for match in re.finditer(r"\.", name)):
            sys.modules.setdefault(package, ModuleType(package))
        stub(name)
        sys.modules[name].__dict__.update(dict.fromkeys(members, Anything()))
    schedule = (checkout / "v2v.py").read_text()
    start = schedule.index("def get_denoising_schedule")
    exec(schedule[start : schedule.index("def encode_video_latent")], sys.modules["v2v"].__dict__)
    sys.modules["v2v"].__dict__["torch"] = torch
    stub("wan.modules.sage", sageattn_func=None, SAGEATTN_AVAILABLE=False)
    stub("demo_utils")
    stub("demo_utils.memory", **dict.fromkeys(MEMORY))
    self_forcing_packages(loop)
    sys.modules["wan.modules.vae"].__dict__["WanVAE"] = None
    cuda: Any = torch.cuda
    cuda.current_device, cuda.Stream, cuda.Event = (lambda: "cpu"), Anything(), Anything()
    path = checkout / "wan/modules/causal_model.py"
    stub("wan.modules.causal_model")
    tokens = path.read_text().replace("frame_seqlen = 1560", f"frame_seqlen = {TOKENS}")
    causal: Any = sys.modules["wan.modules.causal_model"]
    exec(compile(tokens, path, "exec"), causal.__dict__)
    causal.flex_attention = flex_attention
    wrapper: Any = import_module("utils.wan_wrapper")
    pipelines: Any = import_module("pipeline.causal_inference")
    stub("pipeline", CausalInferencePipeline=pipelines.CausalInferencePipeline)
    server: Any = import_module("release_server")

    def run(case: Case) -> Any:
        noise = loop.stored["noise"][None, : case["frames"]]

        generator = loop.generator(
            wrapper.WanDiffusionWrapper, wrapper.FlowMatchScheduler, shift=case["shift"]
        )
        before = torch.randn, torch.bfloat16

        def randn(*shape: Any, **_: Any) -> torch.Tensor:
            return noise if len(shape) == 1 else torch.randn_like(torch.empty(shape))

        everything: Any = torch
        everything.randn, everything.bfloat16 = randn, torch.float32
        try:
            return _session(server, generator, loop, case)
        finally:
            everything.randn, everything.bfloat16 = before

    return run


def _session(server: Any, generator: Any, loop: Loop, case: Case) -> Any:
    args = SimpleNamespace(
        denoising_step_list=[1000], warp_denoising_step=False, independent_first_frame=False,
        num_frame_per_block=case["config"]["num_frame_per_block"], use_taehv=False,
    )  # fmt: skip
    pipeline = server.load_pipeline(args, "cpu", generator, Embeddings(loop.stored), NoVae())
    pipeline.frame_seq_length = TOKENS
    params = server.GenerateParams(
        prompt="prompt_embeds", width=64, height=64, seed=0,
        num_blocks=case["frames"] // args.num_frame_per_block, **case["config"]["params"],
    )  # fmt: skip

    def decoder(latents: torch.Tensor, *_: Any) -> tuple[torch.Tensor, list[None]]:
        return latents.float().repeat_interleave(4, 1), []

    def encoder(*_: Any, frames: torch.Tensor, **__: Any) -> tuple[torch.Tensor, None]:
        return frames[0, :, None].float().flip(0), None

    server.encode_video_latent = encoder
    models = server.Models(pipeline.text_encoder, generator, pipeline, None, decoder)
    session = server.GenerationSession(params, args, models=models)
    for _ in range(params.num_blocks):
        session.generate_block_internal(models)
    return session.all_latents[0]


def causvid(checkout: Path) -> Run:
    """InferencePipeline of tianweiy/CausVid."""
    loop = Loop(checkout, modules="causvid.models.wan.wan_base.modules")
    wan = "causvid.models.wan"
    loop.packages("causvid", "causvid.models", wan, f"{wan}.wan_base", loop.modules)
    without_encoders(loop.modules)
    use_sdpa(loop.modules)
    wrapper: Any = import_module(f"{wan}.wan_wrapper")
    models: Any = sys.modules["causvid.models"]
    models.get_text_encoder_wrapper = lambda **_: lambda: Embeddings(loop.stored)
    models.get_vae_wrapper = lambda **_: NoVae
    loop.modules = wan  # where its causal model is

    def run(case: Case) -> Any:
        models.get_diffusion_wrapper = lambda **_: (
            lambda: loop.generator(
                wrapper.CausalWanDiffusionWrapper, wrapper.FlowMatchScheduler, shift=case["shift"]
            )
        )
        pipeline: Any = import_module(f"{wan}.causal_inference")
        loops = pipeline.InferencePipeline(SimpleNamespace(**case["config"]), "cpu")
        loops.num_transformer_blocks, loops.frame_seq_length = LAYERS, TOKENS
        loops.kv_cache1, loops.crossattn_cache = kv_caches(case["frames"]), text_caches()
        _, latents = loops.inference(
            loop.stored["noise"][None, : case["frames"]], ["prompt_embeds"], return_latents=True
        )
        return latents[0]

    return run


class Shots(Embeddings):
    """Prompts of all chunks at once, the first of a shot with a prefix."""

    def forward(self, text_prompts: list[str]) -> dict[str, torch.Tensor]:
        rows = [self.stored[name.removeprefix(CUT)][0] for name in text_prompts]
        return {"prompt_embeds": torch.stack([pad(r, (0, 0, 0, TEXT - len(r))) for r in rows])}


class Config(dict[str, Any]):
    """Stands for OmegaConf's."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def longlive2(checkout: Path) -> Run:
    """CausalDiffusionInferencePipeline of NVlabs/LongLive 2, without its Triton kernels."""
    os.environ |= {"LLV2_TRITON_ROPE": "0", "LLV2_TRITON_ADALN": "0"}
    loop = Loop(checkout, modules="wan_5b.modules")
    loop.packages("wan_5b", loop.modules, "wan_5b.utils", "pipeline", "utils")
    without_encoders(loop.modules)
    stub(f"{loop.modules}.vae2_2", _video_vae=None)
    stub("omegaconf", OmegaConf=None)
    stub("utils.dataset", DEFAULT_SCENE_CUT_PREFIX=CUT)
    stub("transformers.models.x_clip.modeling_x_clip", x_clip_loss=None)
    use_sdpa(loop.modules)
    sizes: Any = import_module("utils.config")
    sizes.wan_default_config["Wan2.2-TI2V-5B"] = {
        "num_heads": HEADS, "head_dim": HEAD_DIM, "num_transformer_blocks": LAYERS,
    }  # fmt: skip
    wrapper: Any = import_module("utils.wan_5b_wrapper")
    pipeline: Any = import_module("pipeline.causal_diffusion_inference")

    def run(case: Case) -> Any:
        frames, context = case["frames"], case.get("context_frames", 0)
        config = case["config"]
        tables = {name: Config(config[name]) for name in ("model_kwargs", "inference")}
        args = Config(
            **config | tables, image_or_video_shape=[1, frames, *MODEL["latent_shape_per_frame"]]
        )
        generator = loop.generator(
            wrapper.WanDiffusionWrapper, wrapper.FlowMatchScheduler,
            shift=config["model_kwargs"]["timestep_shift"],
        )  # fmt: skip
        generator._compiled_model_call = None
        loops = pipeline.CausalDiffusionInferencePipeline(
            args, "cpu", generator, Shots(loop.stored), NoVae()
        )
        name, prompts = "prompt_embeds", []
        for first in range(0, frames, config["num_frame_per_block"]):
            name = case["prompts"].get(str(first), name)
            prompts.append((CUT if str(first) in case["prompts"] else "") + name)
        latents = loops.inference(
            loop.stored["noise"][None, :frames],
            [prompts],
            initial_latent=loop.stored["initial_latent"][None, :context] if context else None,
            return_latents=True,
        )
        return latents[0]

    return run


MODELS = {
    "causal-forcing": causal_forcing,
    "longlive": longlive,
    "longlive2": longlive2,
    "krea": krea,
    "causvid": causvid,
}


def main(model: str, checkout: str) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    sys.path.insert(0, checkout)
    for name in ("einops", "cv2", "tqdm"):
        with contextlib.suppress(ImportError):
            import_module(name)
            continue
        stub(name, repeat=None, rearrange=None)
    run, last = MODELS[model](Path(checkout)), {}
    for name, case in CASES.items():
        if case["model"] != model:
            continue
        with stored_noise(inputs()["renoise"]), contextlib.redirect_stdout(io.StringIO()):
            latents = run(case)
        last[name] = latents[-case["config"]["num_frame_per_block"] :].contiguous()
        sys.stdout.write(f"{name} {[*latents.shape]}, at most {latents.abs().max():.3f}\n")
    save_file(last, HERE / f"authors_{model}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
