"""What shells complete: names of models and presets, and the choices of settings."""

from collections.abc import Callable

Complete = Callable[[str], list[tuple[str, str]]]  # (value, help) of those that begin so


def complete_from(*choices: str) -> Complete:
    """Complete one of these."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        return [(choice, "") for choice in choices if choice.startswith(incomplete)]

    return complete


def complete_models(incomplete: str) -> list[tuple[str, str]]:
    """Known models, and others in the hub's cache."""
    from wancli.catalog.hub_cache import cached_repos
    from wancli.catalog.specs import SPECS

    known = [(spec.name, spec.description) for spec in SPECS.values()]
    repos = {spec.pulled_from for spec in SPECS.values()}
    others = [(repo, "in the hub's cache") for repo in cached_repos() if repo not in repos]
    return [pair for pair in [*known, *others] if pair[0].startswith(incomplete)]


def complete_files(setting: str) -> Complete:
    """Complete names of files in WANCLI_MODEL_PATH for a setting; shells add those here."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        from wancli.catalog.model_folders import all_files
        from wancli.errors import InputError

        try:
            names = sorted({path.name for path in all_files(setting)})
        except InputError:  # a broken list of folders
            names = []
        return [(name, "") for name in names if name.startswith(incomplete)]

    return complete


def complete_gpus(incomplete: str) -> list[tuple[str, str]]:
    """GPUs that plans know."""
    from wancli.catalog.gpus import GPUS

    return [(key, gpu.name) for key, gpu in GPUS.items() if key.startswith(incomplete)]


def complete_presets(incomplete: str) -> list[tuple[str, str]]:
    """Presets by name."""
    from wancli.config.presets import list_presets

    presets = (listed.preset for listed in list_presets())
    return [(p.name, p.description) for p in presets if p.name.startswith(incomplete)]
