"""A Ray driver whose actors make their videos of nothing."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from tests.batches.fakes import FakeMaker
from wancli.batches import ray_driver
from wancli.batches.remote_maker import NodeNeeds, NodeReport, report_node
from wancli.batches.worker import JobMaker

APART = "WANCLI_TEST_APART"  # set: the machines seem to share no folder


class FakeActor(ray_driver.RayActor):
    """An actor without a model."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._apart = bool(options.get("apart"))
        super().__init__({})

    def _new_maker(self, options: Mapping[str, Any]) -> JobMaker:
        return FakeMaker(**options, report=self._report, warn=self._warn)

    @ray.method(max_task_retries=-1)  # type: ignore[untyped-decorator]
    def ready(self, needs: NodeNeeds) -> NodeReport:
        """As an actor of a machine that shares no folder, where a test says so."""
        node = Path(needs.probe.parent, f"{os.getpid()}.node")
        node.write_text(ray.get_runtime_context().get_node_id())
        report = report_node(needs)
        return replace(report, sees_folder=report.sees_folder and not self._apart)


def main(*arguments: str) -> None:
    """A driver whose actors are fake."""
    vars(ray_driver)["RayActor"] = FakeActor
    ray_driver.main(*arguments)
