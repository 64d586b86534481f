"""`random:NAME` is a known architecture, complete or with its first blocks only."""

import pytest

from wancli.catalog.local import find_spec, revision
from wancli.catalog.random import known_spec
from wancli.catalog.specs import SPECS
from wancli.catalog.tasks import TEXT, WAN
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import Settings
from wancli.cost.totals import generation_cost
from wancli.errors import ModelError, PlanError
from wancli.planning.plan import make_plan

WANS = [spec for spec in SPECS.values() if spec.family is WAN]


def test_a_random_model_has_the_facts_of_the_known_one():
    facts = ("tasks", "strides", "architecture", "experts", "boundary_ratio", "image_encoder")
    for spec in WANS:
        random = find_spec(f"random:{spec.name}")
        assert random.random
        assert (random.folder, random.repo, random.on_hub) == (None, "", False)
        assert [getattr(random, fact) for fact in facts] == [getattr(spec, fact) for fact in facts]
        assert find_spec(f"random:{spec.repo or spec.name}") == random
        assert known_spec(random.name) == spec


def test_layers_limit_every_component():
    assert find_spec("random:wan2.1-t2v-1.3b", layers=2).layers == 2
    assert find_spec("random:wan2.1-t2v-1.3b", layers=99) == find_spec("random:wan2.1-t2v-1.3b")
    shapes = find_spec("random:wan2.1-i2v-14b-480p", layers=30).wan
    assert shapes.image_encoder
    assert (shapes.transformer.layers, shapes.image_encoder.layers) == (30, 30)
    assert shapes.text_encoder.layers == 24


def test_the_weights_are_identified_by_name_and_layers():
    revisions = {
        revision(find_spec(f"random:{name}", layers=layers))
        for name in ("demo", "self-forcing", "wan2.1-t2v-1.3b")
        for layers in (1, 2, None)
    }
    assert len(revisions) == 9
    assert revision(find_spec("random:demo", layers=2)) == "random:demo layers=2"


@pytest.mark.parametrize(
    ("model", "layers", "hint"),
    [("demo", 2, "random:demo"), ("wan2.1-t2v-14b", 2, "random:wan2.1-t2v-14b"),
     ("owner/name", 2, "drop `layers`"), ("random:wan2.2-animate-14b", 7, "`layers 5` or 10")],
)  # fmt: skip
def test_impossible_layers_are_rejected(model: str, layers: int, hint: str):
    with pytest.raises(PlanError) as caught:
        find_spec(model, layers=layers)
    assert hint in caught.value.hint


@pytest.mark.parametrize("model", ["random:wan2.1-t2v-1.4b", "random:", "random:owner/name"])
def test_an_unknown_model_is_rejected_with_a_list_of_known_ones(model: str):
    with pytest.raises(ModelError) as caught:
        find_spec(model)
    assert "known: demo, wan2.1" in caught.value.hint


def test_a_plan_counts_only_the_remaining_layers():
    def cost(layers: int | None) -> tuple[int, int]:
        tables = {"model": "random:wan2.1-t2v-1.3b", "machine": {"layers": layers}}
        settings = resolve([Layer("flag", tables)], Settings).settings
        spec = find_spec(settings.model, layers=settings.machine.layers)
        cost = generation_cost(settings, spec, make_plan(settings, spec, task=TEXT), wide=False)
        assert cost
        return cost.parameters["transformer"], cost.work["denoise"].flops

    whole, two, one = cost(None), cost(2), cost(1)
    for at in (0, 1):
        assert whole[at] - two[at] == 28 * (two[at] - one[at])
