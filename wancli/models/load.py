"""Load a pipeline, completely or not at all: a missing key is an error, never a random weight."""

import inspect
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import UniPCMultistepScheduler
from PIL import Image

from wancli.catalog.decoder_files import check_decoder
from wancli.catalog.hf_configs import CLASSES
from wancli.catalog.local import PARTS, check_available, check_files, read_config, spec_of_folder
from wancli.catalog.specs import ModelSpec
from wancli.catalog.tasks import EXPERTS, TASKS, TEXT
from wancli.config.precision import decoder_dtype, decodes_fast, transformer_dtype, vae_dtype
from wancli.config.settings import Machine
from wancli.errors import CapacityError, ModelError, WancliError, first_line, no_device, some
from wancli.models.attention import set_backend
from wancli.models.fast_decoder import DecoderSpeedups, speed_up_decoder
from wancli.models.hub import download, hub_errors
from wancli.models.lora import merge_loras
from wancli.models.memory import fits_in_memory, ran_out
from wancli.models.offload import place
from wancli.models.optimize import check_speed, speed_up
from wancli.models.random_weights import random_components, random_part
from wancli.models.single_file import read_part
from wancli.models.tiny_decoder import load_tiny_decoder
from wancli.models.warm import UNWATCHED, LoadWatch, OnBytes
from wancli.planning.lora import find_lora
from wancli.planning.rules_machine import check_gguf_package
from wancli.records.progress import Loading, Report


@dataclass(frozen=True)
class Loaded:
    """A pipeline on its device, and the spec of its model."""

    pipeline: Any  # of the task's class
    spec: ModelSpec
    device: torch.device


def load_pipeline(
    spec: ModelSpec, machine: Machine, parts: Collection[str] = PARTS, *, task: str = TEXT,
    stays: Collection[str] = (), watch: LoadWatch = UNWATCHED,
) -> Loaded:  # fmt: skip
    """Load the `parts` of a model into diffusers' pipeline for a task.

    The image encoder is in float32; `stays` as in `place`. Raises ModelError for broken files and
    for a model that cannot do the task, SetupError for a missing device.
    """
    device = pick_device(machine.device)
    dtype: torch.dtype = getattr(torch, transformer_dtype(machine, device.type))
    with fits_in_memory(spec.name):
        check_speed(machine, device)
    spec = _on_disk(spec, parts, watch.on_bytes)
    if task not in spec.tasks:
        raise ModelError(
            f"{spec.name} is {' and '.join(spec.tasks)}, not {task}.",
            hint=f"`task {spec.tasks[0]}`",
        )
    classes = TASKS[task]
    # Random weights are made where they are kept, or quantized before.
    cpu = torch.device("cpu")
    at = device if machine.offload in ("auto", "none") else cpu
    transformer_at = at if machine.quantize == "none" else cpu
    reading = _Reading(spec, parts, watch.report)
    with _quiet(), load_errors(spec):
        ready: dict[str, Any] = {"vae": None}
        if "vae" in parts:
            reading.begin("vae")
            ready["vae"] = _vae(spec, machine, at, kind=device.type)
        for name in ("transformer", "transformer_2")[: spec.experts]:
            reading.begin(name)
            ready[name] = _part(
                getattr(diffusers, classes.transformer), spec, name, dtype, transformer_at,
                draw_on=device,
            )  # fmt: skip
        if "text_encoder" in parts:
            ready |= _encoders(spec, reading, dtype, at)
        kind = getattr(diffusers, classes.pipeline)
        pipeline = _assemble(kind, spec, ready, dtype, at, text="text_encoder" in parts)
        if machine.attention_backend != "auto":
            set_backend(transformers_of(pipeline), machine.attention_backend, device)
        merge_loras(pipeline, [find_lora(text) for text in machine.lora])
        speed_up(transformers_of(pipeline), machine)
        _try_tokenizers(pipeline)
        _try_image_processor(pipeline)
        place(pipeline, device, machine.offload, stays=stays)
    pipeline.set_progress_bar_config(disable=True)
    return Loaded(pipeline, spec, device)


def _assemble(
    kind: Any, spec: ModelSpec, ready: Mapping[str, Any], dtype: torch.dtype, device: torch.device,
    *, text: bool,
) -> Any:  # fmt: skip
    """A pipeline of the parts that are ready, and with `text` of all others, which it loads."""
    if not text:
        nothing = {"tokenizer": None, "text_encoder": None, "scheduler": UniPCMultistepScheduler()}
        return kind(**nothing, **ready)
    if spec.random:
        return kind(**{**random_components(spec, dtype=dtype, device=device), **ready})
    return kind.from_pretrained(str(spec.folder), dtype=dtype, local_files_only=True, **ready)


def _encoders(
    spec: ModelSpec, reading: "_Reading", dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """The encoders that the pipeline does not load itself."""
    encoders = {}
    if spec.image_encoder:
        reading.begin("image_encoder")
        encoders["image_encoder"] = _image_encoder(spec, device)
    reading.begin("text_encoder")
    if spec.file_of("text_encoder"):
        kind = getattr(transformers, CLASSES["text_encoder"])
        encoders["text_encoder"] = _part(kind, spec, "text_encoder", dtype, device)
    return encoders


class _Reading:
    """Reports each part before its weights are read, with the bytes of those before it."""

    def __init__(self, spec: ModelSpec, parts: Collection[str], report: Report) -> None:
        """Random weights are not read, and not reported."""
        of_text = ("text_encoder", "text_encoder_2", "image_encoder")
        names = [*EXPERTS.values(), *(part for part in parts if part == "vae")]
        names += of_text if "text_encoder" in parts else ()
        self._bytes = {name: _weight_bytes(spec, name) for name in names}
        self._done, self._report = 0, report

    def begin(self, part: str) -> None:
        """Report that this part is read next."""
        if total := sum(self._bytes.values()):
            self._report(Loading(part, self._done, total))
            self._done += self._bytes[part]


def _weight_bytes(spec: ModelSpec, part: str) -> int:
    """Bytes of a part's files; 0 where it has none."""
    if file := spec.file_of(part):
        return file.bytes
    files = (spec.folder / part).glob("*.safetensors") if spec.folder else ()
    return sum(file.stat().st_size for file in files)


def switch_task(loaded: Loaded, task: str) -> Loaded:
    """The same weights in the pipeline of another task of the model."""
    kind, pipeline = getattr(diffusers, TASKS[task].pipeline), loaded.pipeline
    if type(pipeline) is kind:
        return loaded
    return replace(loaded, pipeline=_built(kind, {**pipeline.config, **pipeline.components}))


def place_again(loaded: Loaded, machine: Machine) -> None:
    """Bring weights to the device that an error has left in RAM; not those that are offloaded.

    Raises CapacityError.
    """
    if machine.offload in ("auto", "none"):
        with fits_in_memory(loaded.spec.name):
            loaded.pipeline.to(loaded.device)


def load_beside(loaded: Loaded, machine: Machine, *, task: str) -> Loaded:
    """The same model with other speed-ups: its own transformers, and what is loaded besides.

    Offloaded, it shares nothing: parts move with the pipeline that they belong to.
    """
    if machine.offload != "none":
        return load_pipeline(loaded.spec, machine, task=task)
    pipeline = loaded.pipeline
    other = load_pipeline(loaded.spec, machine, ("transformer",), task=task).pipeline
    own = {name: other.components.get(name) for name in EXPERTS.values()}
    parts = {**pipeline.config, **pipeline.components, **own}
    return replace(loaded, pipeline=_built(type(pipeline), parts))


def _built(kind: Any, parts: Mapping[str, Any]) -> Any:
    """A pipeline of those of the parts and settings that it has."""
    names = inspect.signature(kind.__init__).parameters
    pipeline = kind(**{name: parts[name] for name in names if name in parts})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _try_tokenizers(pipeline: Any) -> None:
    """Fail now, not after everything has loaded, if a tokenizer lacks a file."""
    for name in ("tokenizer", "tokenizer_2"):
        if tokenizer := pipeline.components.get(name):
            tokenizer("a", padding="max_length", max_length=8, truncation=True)


def _try_image_processor(pipeline: Any) -> None:
    """Fail now if CLIP's pictures do not come out in its size."""
    processor, encoder = (
        pipeline.components.get(name) for name in ("image_processor", "image_encoder")
    )
    if processor and encoder:
        pixels = processor(images=Image.new("RGB", (8, 8)), return_tensors="pt").pixel_values
        side, shape = encoder.config.image_size, tuple(pixels.shape[1:])
        if shape != (3, side, side):
            raise ValueError(f"its image_processor makes {shape} of a picture, not {side}x{side}")


def transformers_of(pipeline: Any) -> list[Any]:
    """The transformer, or the two experts: high noise first."""
    components = (pipeline.components.get(name) for name in EXPERTS.values())
    return [transformer for transformer in components if transformer is not None]


def load_vae(spec: ModelSpec, machine: Machine) -> tuple[Any, torch.device]:
    """Load the VAE alone, and return it with its device."""
    check_gguf_package(spec)
    spec, device = _on_disk(spec, ("vae",)), pick_device(machine.device)
    with _quiet(), load_errors(spec):
        return _vae(spec, machine, device, kind=device.type).to(device), device


def resolve_machine(machine: Machine) -> Machine:
    """The settings with `auto` resolved for this machine. Raises SetupError."""
    device, backend = pick_device(machine.device), machine.attention_backend
    if backend == "auto" and device.type != "cuda":  # there it depends on the model
        backend = os.environ.get("DIFFUSERS_ATTN_BACKEND", "native")
    dtype = transformer_dtype(machine, device.type)
    resolved = {"device": device.type, "dtype": dtype, "attention_backend": backend}
    return machine.model_copy(update=resolved)


def pick_device(name: str) -> torch.device:
    """The device of that name, or the best one for `auto`. Raises SetupError if it is missing."""
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "mps" if has_mps else "cpu")
    device = torch.device(name)
    available = {"cpu": True, "mps": has_mps, "cuda": has_cuda}[device.type]
    if not available or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise no_device(name)
    return device


def _on_disk(spec: ModelSpec, parts: Collection[str], on_bytes: OnBytes | None = None) -> ModelSpec:
    """The spec with its folder: hub models are downloaded, files are checked."""
    check_decoder(spec)
    if spec.on_hub:
        check_available(spec)
        with load_errors(spec):
            without = [file.part for file in spec.files]
            folder = download(spec.repo, on_bytes, without=without)
        read = spec_of_folder(folder, name=spec.name, repo=spec.repo)
        spec = replace(read, files=spec.files, tiny_decoder=spec.tiny_decoder)
        check_decoder(spec)
    check_files(spec, parts)
    return spec


def _vae(spec: ModelSpec, machine: Machine, at: torch.device, *, kind: str) -> Any:
    """The VAE, loaded to a device, for decoding on a `kind` of device."""
    vae_class = getattr(diffusers, spec.family.vae)
    vae = _part(vae_class, spec, "vae", getattr(torch, vae_dtype(machine)), at)
    dtype = getattr(torch, decoder_dtype(machine, kind))
    if spec.tiny_decoder:
        vae.decoder = load_tiny_decoder(spec, dtype=dtype, device=at)
    elif decodes_fast(machine, kind):
        # To time cuDNN's kernels takes longer than to decode a clip.
        speed_up_decoder(vae, DecoderSpeedups(dtype=dtype, benchmark=False))
    if machine.vae_tiling:
        vae.enable_tiling()
    return vae


def _part(
    kind: Any, spec: ModelSpec, name: str, dtype: torch.dtype, device: torch.device, *,
    draw_on: torch.device | None = None,
) -> Any:  # fmt: skip
    """Load one component, with exactly the keys it should have; a random one on the device."""
    if file := spec.file_of(name):
        return read_part(kind, spec, file, dtype=dtype)
    if spec.random:
        return random_part(kind, spec, name, dtype=dtype, device=device, draw_on=draw_on)
    problems = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return _checked_part(kind, spec, name, dtype=dtype, problems=problems)


def _image_encoder(spec: ModelSpec, device: torch.device) -> Any:
    """CLIP's vision tower, from whichever CLIP class the model's authors saved."""
    if spec.random:
        kind = getattr(transformers, CLASSES["image_encoder"])
        return random_part(kind, spec, "image_encoder", dtype=torch.float32, device=device)
    index = read_config(Path(str(spec.folder)), "model_index.json")
    kind = getattr(transformers, index["image_encoder"][1])
    problems = ("missing_keys", "mismatched_keys")
    return _checked_part(kind, spec, "image_encoder", dtype=torch.float32, problems=problems)


def _checked_part(
    kind: Any, spec: ModelSpec, name: str, *, dtype: torch.dtype, problems: Collection[str]
) -> Any:
    model, report = kind.from_pretrained(
        str(spec.folder), subfolder=name, dtype=dtype, local_files_only=True,
        output_loading_info=True,
    )  # fmt: skip
    for problem in problems:
        if keys := sorted(map(str, report.get(problem) or ())):
            raise ModelError(
                f"{name} of {spec.name}: {problem.replace('_', ' ')}: {some(keys, most=3)}.",
                hint="the weights do not match the config.json beside them: copy the model again",
            )
    return model


@contextmanager
def load_errors(spec: ModelSpec) -> Iterator[None]:
    """Turn errors of the libraries into WancliErrors with a hint."""
    where = spec.repo or str(spec.folder or spec.name)
    try:
        with hub_errors(where):
            yield
    except WancliError:
        raise
    except Exception as error:  # libraries can raise anything on a broken model
        if ran_out(error):
            raise CapacityError(
                f"model '{where}' does not fit in memory.",
                hint="`dtype bfloat16`, or a smaller `model`; on a GPU `offload sequential`",
            ) from None
        raise ModelError(
            f"cannot load model '{where}': {first_line(error)}", hint="copy the model folder again"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no warnings of the libraries in the block."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(each, each.get_verbosity(), each.is_progress_bar_enabled()) for each in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, verbosity, bars in before:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
