"""Video generation with the Wan diffusion models, from a shell and from Python.

    import wancli

    video = wancli.generate("a red circle moving right", seed=1)  # video.frames, video.record
    for chunk in wancli.rollout("a red circle moving right", chunks=20):
        ...  # chunk.frames, as they are made
    with wancli.load("demo") as model:  # the weights stay
        first, second = model.generate("a red circle"), model.generate("a blue square")
    print(wancli.plan(model="wan2.1-t2v-14b").fits)

Everything is imported when it is first used: `import wancli` itself takes no time.
"""

TYPE_CHECKING = False  # importing typing would take time
if TYPE_CHECKING:
    from wancli.api import (
        ChunkKeywords,
        ClipKeywords,
        GenerateKeywords,
        LoadKeywords,
        Model,
        PlanKeywords,
        RolloutKeywords,
        RolloutStream,
        Video,
        VideoPlan,
        generate,
        load,
        plan,
        rollout,
    )
    from wancli.errors import (
        CapacityError,
        InputError,
        ModelError,
        OutputError,
        PlanError,
        PresetError,
        RunError,
        SettingsError,
        SetupError,
        UsageError,
        WancliError,
    )
    from wancli.records.progress import ChunkDone, Decoded, Loading, Phase, PreviewEvent, Step
    from wancli.rollouts.runner import RolloutChunk
else:

    def __getattr__(name):  # noqa: ANN001, ANN202
        """What `__all__` names, from the first module that has it."""
        if name in __all__:
            from importlib import import_module

            for home in ("errors", "api", "records.progress", "rollouts.runner"):
                module = import_module(f"wancli.{home}")
                if hasattr(module, name):
                    globals()[name] = getattr(module, name)
                    return globals()[name]
        raise AttributeError(f"module 'wancli' has no attribute {name!r}")

    def __dir__():  # noqa: ANN202
        return sorted({*globals(), *__all__})


__all__ = [
    "CapacityError",
    "ChunkDone",
    "ChunkKeywords",
    "ClipKeywords",
    "Decoded",
    "GenerateKeywords",
    "InputError",
    "LoadKeywords",
    "Loading",
    "Model",
    "ModelError",
    "OutputError",
    "Phase",
    "PlanError",
    "PlanKeywords",
    "PresetError",
    "PreviewEvent",
    "RolloutChunk",
    "RolloutKeywords",
    "RolloutStream",
    "RunError",
    "SettingsError",
    "SetupError",
    "Step",
    "UsageError",
    "Video",
    "VideoPlan",
    "WancliError",
    "generate",
    "load",
    "plan",
    "rollout",
]
