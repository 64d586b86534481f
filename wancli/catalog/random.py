"""Random models: a known architecture with weights drawn at load time instead of downloaded."""

from dataclasses import replace

from wancli.catalog.specs import RANDOM, SPECS, ModelSpec
from wancli.catalog.wan import Architecture, Transformer
from wancli.errors import ModelError, PlanError, closest


def known_spec(model: str) -> ModelSpec | None:
    """The known model with that name or hub id, with or without the `random:` prefix."""
    name = model.removeprefix(RANDOM)
    named = (spec for spec in SPECS.values() if name and name in (spec.name, spec.repo))
    return next(named, None)


def random_spec(model: str, *, layers: int | None = None) -> ModelSpec:
    """Spec of `random:NAME`, limited to `layers` blocks. Raises ModelError, PlanError."""
    known = known_spec(model)
    if known is None or not isinstance(known.architecture, Architecture):
        shapes = [name for name, s in SPECS.items() if isinstance(s.architecture, Architecture)]
        near, names = closest(model.removeprefix(RANDOM), shapes), ", ".join(shapes)
        raise ModelError(
            f"model '{model}': random weights need the name of a known Wan model.",
            hint=f"did you mean '{RANDOM}{near}'? known: {names}" if near else f"known: {names}",
        )
    return replace(
        known,
        name=f"{RANDOM}{known.name}",
        repo="",
        folder=None,
        checkpoint=None,
        description=f"Random weights in the shape of {known.name}.",
        architecture=keep_layers(known.architecture, layers) if layers else known.architecture,
        random=True,
    )


def keep_layers(shapes: Architecture, layers: int) -> Architecture:
    """The architecture with at most `layers` blocks per transformer and encoder, and the whole VAE.

    VACE blocks are kept beside the blocks that are kept. Wan-Animate's face adapters follow every
    fifth block, or the last one if there are fewer; other numbers of blocks raise PlanError.
    """
    text, image = shapes.text_encoder, shapes.image_encoder
    return replace(
        shapes,
        transformer=_keep_blocks(shapes.transformer, layers),
        text_encoder=replace(text, layers=min(layers, text.layers)),
        image_encoder=image and replace(image, layers=min(layers, image.layers)),
    )


def _keep_blocks(t: Transformer, layers: int) -> Transformer:
    count, face = min(layers, t.layers), t.face
    if face:
        face = replace(face, every=min(face.every, count))
        if rest := count % face.every:
            raise PlanError(
                f"`layers {layers}`: Wan-Animate shows faces to every {face.every}th block.",
                hint=f"`layers {count - rest}` or {count - rest + face.every}",
            )
    vace_every = -(-t.layers // t.vace_blocks) if t.vace_blocks else 0
    vace = -(-count // vace_every) if vace_every else 0
    return replace(t, layers=count, vace_blocks=vace, face=face)
