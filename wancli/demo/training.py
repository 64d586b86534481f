"""Optimizer, learning rate schedule, captured steps, checkpoints and curves of all trainings."""

import json
import logging
import math
import signal
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

logger = logging.getLogger("wancli.demo")

Tensors = TypeVar("Tensors", bound=Iterable[Tensor])

_WARMUP = 50  # steps


class Optimizer:
    """Muon on the matrices (convolutions as [out, in * kernel]), AdamW on everything else.

    The rates are tensors, so that a CUDA graph of a step reads them anew.
    """

    def __init__(
        self, matrices: Iterable[Tensor], rest: Iterable[Tensor], *, muon_lr: float, adam_lr: float
    ) -> None:
        self.rest = list(rest)
        self.muon = BatchedMuon(matrices, lr=muon_lr)
        self.adam = Adam(self.rest, lr=adam_lr, betas=(0.9, 0.98))

    def set_rate(self, scale: float) -> None:
        """Set the rates of the next steps, in units of the peak rates."""
        self.muon.scale.fill_(scale)
        self.adam.set_rate(scale)

    def zero_grad(self) -> None:
        """Clear the gradients."""
        clear_gradients((*self.muon.matrices, *self.rest))

    def step(self) -> None:
        """Apply the gradients."""
        self.muon.step()
        self.adam.step()

    def state_dict(self) -> dict[str, Any]:
        """State to resume from, on any device."""
        return {"muon": self.muon.momentum, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict`."""
        for ours, saved in zip(self.muon.momentum, state["muon"], strict=True):
            ours.copy_(saved)
        self.adam.load_state_dict(state["adam"])


class Adam:
    """AdamW without decay, on gradients that are clipped to a norm of 1."""

    def __init__(
        self, parameters: Iterable[Tensor], *, lr: float, betas: tuple[float, float]
    ) -> None:
        self.parameters, self.lr = list(parameters), lr
        device = self.parameters[0].device
        on_cuda = device.type == "cuda"
        self._adam = torch.optim.AdamW(
            self.parameters, lr=torch.tensor(lr, device=device), betas=betas, weight_decay=0.0,
            fused=on_cuda, capturable=on_cuda,
        )  # fmt: skip

    def set_rate(self, scale: float) -> None:
        """Set the rate of the next steps, in units of the peak rate."""
        self._adam.param_groups[0]["lr"].fill_(self.lr * scale)

    def step(self) -> None:
        """Apply the gradients."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._adam.step()

    def state_dict(self) -> dict[int, dict[str, Tensor]]:
        """State to resume from, on any device."""
        state: dict[int, dict[str, Tensor]] = self._adam.state_dict()["state"]
        return state

    def load_state_dict(self, state: dict[int, dict[str, Tensor]]) -> None:
        """Resume from `state_dict`."""
        self._adam.load_state_dict({**self._adam.state_dict(), "state": state})


def clear_gradients(parameters: Iterable[Tensor]) -> None:
    """Forget the gradients."""
    for p in parameters:
        p.grad = None


class Average:
    """Exponential moving average of named tensors."""

    def __init__(self, tensors: Mapping[str, Tensor], *, decay: float) -> None:
        self.tensors = {name: t.detach().clone() for name, t in tensors.items()}
        self.decay = decay
        self._change = torch.ones((), device=next(iter(tensors.values())).device)

    def set_step(self, step: int) -> None:
        """Set the step of the next update: the first ones forget faster."""
        self._change.fill_(1 - min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor]) -> None:
        """Move towards the tensors of a step."""
        names = [name for name, t in self.tensors.items() if t.is_floating_point()]
        old, new = ([some[name] for name in names] for some in (self.tensors, tensors))
        differences = torch._foreach_sub(new, old)
        torch._foreach_mul_(differences, self._change)
        torch._foreach_add_(old, differences)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Resume from saved `tensors`."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])


class BatchedMuon:
    """Muon on matrices, those of one shape together: the same as torch.optim.Muon on each.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. Tensors with more dimensions
    count as [first, others].
    """

    MOMENTUM, STEPS, COEFFICIENTS, EPSILON = 0.95, 5, (3.4445, -4.7750, 2.0315), 1e-7

    def __init__(self, matrices: Iterable[Tensor], *, lr: float) -> None:
        self.lr = lr
        shapes: dict[tuple[int, int], list[Tensor]] = {}
        for p in matrices:
            shapes.setdefault((len(p), p[0].numel()), []).append(p)
        self.groups = list(shapes.values())
        self.matrices = [p for group in self.groups for p in group]
        self.momentum = [
            torch.zeros(len(group), *shape, device=group[0].device)
            for shape, group in shapes.items()
        ]
        self.scale = torch.ones((), device=self.matrices[0].device)

    @torch.no_grad()
    def step(self) -> None:
        """Apply the gradients; a matrix without one counts as with zeros."""
        for group, momentum in zip(self.groups, self.momentum, strict=True):
            rows, columns = momentum.shape[1:]
            gradients = torch.stack(
                [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            ).view_as(momentum)
            momentum.lerp_(gradients, 1 - self.MOMENTUM)
            update = self._orthogonal(gradients.lerp_(momentum, self.MOMENTUM))
            update = update.float() * (self.scale * -self.lr * math.sqrt(max(1, rows / columns)))
            flat = [p.detach().view(rows, columns) for p in group]
            torch._foreach_add_(flat, list(update.unbind()))

    def _orthogonal(self, matrices: Tensor) -> Tensor:
        """Nearly the nearest orthogonal matrices, by Newton-Schulz iterations in bfloat16."""
        tall = matrices.shape[1] > matrices.shape[2]
        x = matrices.mT.bfloat16() if tall else matrices.bfloat16()
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=self.EPSILON)
        a, b, c = self.COEFFICIENTS
        for _ in range(self.STEPS):
            gram = x @ x.mT
            gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, gram, x, beta=a)
        return x.mT if tall else x


def make_stream(device: str) -> torch.cuda.Stream | None:
    """A stream of that CUDA device; None on others, which have none."""
    if torch.device(device).type != "cuda":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class CapturedStep:
    """A training step that CUDA replays as one graph; elsewhere it is called as it is.

    One launch for a few thousand small kernels, whose launches take longer than they run. `step`
    takes and returns tensors; there is a graph for each combination of their shapes and of its
    keyword arguments. A step that cannot be captured (it waits for the device) is called as it is.
    """

    EAGER = 3  # calls before the capture, in which libraries allocate what they need
    AHEAD = 4  # steps that may wait for the device, so that a stop or a log is never far behind

    def __init__(self, step: Callable[..., Tensor], *, device: str) -> None:
        self.step = step
        self.stream = make_stream(device)
        self.calls: dict[Hashable, int] = {}
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self._replays: deque[torch.cuda.Event] = deque()

    def __call__(self, *inputs: Tensor, **constants: Hashable) -> Tensor:
        """Take a step."""
        if self.stream is None:
            return self.step(*inputs, **constants)
        key = (*(t.shape for t in inputs), *constants.items())
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] == self.EAGER + 1:
            self._capture(key, inputs, constants)
        if key in self.graphs:
            graph, static, out = self.graphs[key]
            for ours, new in zip(static, inputs, strict=True):
                ours.copy_(new)
            graph.replay()
            self._limit_replays()
            return out.clone()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            out = self.step(*inputs, **constants)
        torch.cuda.current_stream().wait_stream(self.stream)
        return out

    def _limit_replays(self) -> None:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record()
        self._replays.append(event)
        if len(self._replays) > self.AHEAD:
            self._replays.popleft().synchronize()

    def _capture(
        self, key: Hashable, inputs: Iterable[Tensor], constants: dict[str, Hashable]
    ) -> None:
        static, graph = [t.clone() for t in inputs], torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                out = self.step(*static, **constants)
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a failed capture leaves its own
            logger.warning("no CUDA graph of %s: %s", constants, str(error).splitlines()[0])
        else:
            self.graphs[key] = graph, static, out


class Feed:
    """Prepares tensors for a device on a stream of their own, while it still runs a step."""

    def __init__(self, device: str) -> None:
        self.stream = make_stream(device)

    def __call__(self, prepare: Callable[[], Tensors]) -> Tensors:
        """What `prepare` returns, for use on the current stream."""
        if self.stream is None:
            return prepare()
        with torch.cuda.stream(self.stream):
            tensors = prepare()
        current = torch.cuda.current_stream()
        current.wait_stream(self.stream)
        for tensor in tensors:
            tensor.record_stream(current)
        return tensors


def rate(step: int, steps: int, *, hold: float = 0.5) -> float:
    """Fraction of the peak learning rate: short warmup, constant, then linear decay to 2 %."""
    left = (steps - step) / max(1.0, steps * (1 - hold))
    return min(1.0, (step + 1) / _WARMUP, max(0.02, left))


class Log:
    """A training curve: a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._waiting: list[tuple[dict[str, float], Tensor]] = []

    def write(self, **values: float) -> None:
        """Append one line."""
        self._append([values])

    def collect(self, values: dict[str, float], loss: Tensor) -> None:
        """Note a line with a loss [] for `flush`, without waiting for the device."""
        self._waiting.append((values, loss))

    def flush(self) -> None:
        """Append the collected lines."""
        if self._waiting:
            losses = torch.stack([loss for _, loss in self._waiting]).tolist()
            lines = [values for values, _ in self._waiting]
            self._append([{**v, "loss": loss} for v, loss in zip(lines, losses, strict=True)])
            self._waiting = []

    def _append(self, lines: Iterable[dict[str, float]]) -> None:
        with self.path.open("a") as file:
            for values in lines:
                file.write(json.dumps({k: round(v, 5) for k, v in values.items()}) + "\n")


class Stop:
    """Whether SIGTERM or the end of the time has come: a training then saves and exits."""

    def __init__(self) -> None:
        self.requested = False

    def install(self, seconds: float | None) -> None:
        """Stop at SIGTERM, and after `seconds`."""
        for number in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, lambda *_: setattr(self, "requested", True))
        if seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, seconds)


stop = Stop()


def save_checkpoint(path: Path, **state: Any) -> None:
    """Write whole or not at all; exits if a stop was requested."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)
    if stop.requested:
        logger.info("stopped at step %s of %s", state["step"], path.stem)
        raise SystemExit(0)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The state that `save_checkpoint` wrote, or None on a first run."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def is_checkpoint(done: int, steps: int, *, every: int) -> bool:
    """Whether to save after `done` steps: at times, at the end, and when told to stop."""
    return done % every == 0 or done == steps or stop.requested


def batches(first: int, steps: int) -> Iterator[tuple[int, int]]:
    """Yield (step, seed of its data) from `first` on: resuming gives the same data."""
    for step in range(first, steps):
        yield step, 1_000_003 * (step + 1)
