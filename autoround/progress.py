"""What a run tells while it works. Torch-free."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

REPORT_SECONDS = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A moment of a run; sent a few times a second while tuning, for each block of an evaluation, when a phase begins.

    Attributes:
        phase: what is being done.
        block, blocks: number of the current block, from 1, and of all; block is 0 before the first, and blocks
            while loading. Of an evaluation they are those of the model that runs.
        step, steps: of the current block, or of the scales of all blocks; of an evaluation, tokens scored after the
            last one, and all.
        loss_first, loss: of the first step and of the latest; None before the first step.
        tokens_per_second: of tuning in this block.
        seconds, eta_seconds: since the start, and still to go as far as known.
        then: what comes after all that ``eta_seconds`` counts and takes its time too; empty where nothing does.
        memory_bytes: held by this process on the device in use.
        message: detail of the phase.
    """

    phase: Literal["loading", "calibration", "tuning", "scales", "export", "evaluation"]
    block: int
    blocks: int
    step: int = 0
    steps: int = 0
    loss_first: float | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds: float = 0.0
    eta_seconds: float | None = None
    then: str = ""
    memory_bytes: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDone:
    """A finished block.

    Attributes:
        index: from 0, in call order.
        path: module path in the model.
        loss_first, loss_best, loss_last: mean squared error of the block's output on the minibatch of the first
            step, the best and the last; 0 where nothing was tuned.
        seconds: spent on it.
        resumed: taken from the journal of an interrupted run.
        tokens: module of experts, relative to the block -> calibration tokens that each of them took.
    """

    index: int
    path: str
    loss_first: float = 0.0
    loss_best: float = 0.0
    loss_last: float = 0.0
    seconds: float = 0.0
    resumed: bool = False
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class Meter:
    """Turns the engine's steps into ``Progress`` events, at most a few a second.

    Args:
        blocks: of the run.
        steps: of each block.
        memory: bytes held on the device.
        listen: where events go.
        abreast: blocks that are tuned at the same time, each by another process.
        then: what follows the last block.
    """

    def __init__(
        self,
        blocks: int,
        steps: int,
        memory: Callable[[], int],
        listen: Callable[[Progress], None] | None,
        abreast: int = 1,
        then: str = "",
    ) -> None:
        self._blocks, self._steps, self._memory, self._listen = blocks, steps, memory, listen
        self._abreast, self._then = abreast, then
        self._start = time.monotonic()
        self._block, self._reported, self._loss_first = 0, 0.0, 0.0
        # Of the current block: when it began, when its first step was done, and its latest.
        self._block_start = self._tuning_start = self._step_end = self._start
        # Of the blocks that this run did: all seconds, and for the latest those after its first and its last step.
        self._taken: list[float] = []
        self._after_first = self._after_last = 0.0

    def phase(self, phase: Literal["calibration", "tuning", "scales", "export"], message: str) -> None:
        """A phase begins."""
        self._tell(phase, message, None)

    def _tell(
        self,
        phase: Literal["calibration", "tuning", "scales", "export"],
        message: str,
        eta: float | None,
        then: str = "",
    ) -> None:
        if self._listen is not None:
            self._listen(Progress(phase=phase, block=self._block, blocks=self._blocks, message=message,
                                  seconds=self._elapsed(), eta_seconds=eta, then=then,
                                  memory_bytes=self._memory()))  # fmt: skip

    def resumed(self, index: int, path: str, stats: Mapping[str, Any]) -> BlockDone:
        """A block was found finished."""
        self._block = index + 1
        self._start = time.monotonic()
        return BlockDone(index=index, path=path, resumed=True, **stats)

    def begin(self, index: int, path: str) -> None:
        """A block begins."""
        self._block = index + 1
        self._block_start = self._tuning_start = self._step_end = time.monotonic()
        usual = median(self._taken[1:] or self._taken) if self._taken else None
        self._tell("tuning", path, None if usual is None else usual * (1 + self._turns_left()), self._then)

    def step(self, step: int, tokens: int, loss: Callable[[], float]) -> None:
        """A tuning step of so many tokens is done; its loss is read only when it is time to report."""
        now = self._step_end = time.monotonic()
        if step == 1:
            self._tuning_start, self._loss_first, self._reported = now, loss(), 0.0
        if self._listen is None or now - self._reported < REPORT_SECONDS:
            return
        self._reported = now
        rate = (step - 1) * tokens / (now - self._tuning_start) if step > 1 else None
        self._listen(Progress(
            phase="tuning", block=self._block, blocks=self._blocks, step=step, steps=self._steps,
            loss_first=self._loss_first, loss=loss(), tokens_per_second=rate, seconds=self._elapsed(),
            eta_seconds=self._eta(step, now), then=self._then, memory_bytes=self._memory()))  # fmt: skip

    def scales(self, step: int, steps: int, loss: float) -> None:
        """A step of the scales of all blocks is done; the first one may compile, and says nothing of the others."""
        now = time.monotonic()
        if step == 1:
            self._tuning_start, self._loss_first = now, loss
        if self._listen is not None:
            eta = (now - self._tuning_start) / (step - 1) * (steps - step) if step > 1 else None
            self._listen(Progress(phase="scales", block=self._block, blocks=self._blocks, step=step, steps=steps,
                                  loss_first=self._loss_first, loss=loss, seconds=self._elapsed(), eta_seconds=eta,
                                  memory_bytes=self._memory()))  # fmt: skip

    def _eta(self, step: int, now: float) -> float | None:
        """Time left after a step of this block.

        The first block of a run waits for the compiler, before its first step is done, and so says nothing of the
        others but what came after that step. From the third on a block is foretold from those between, by the median:
        one of another structure is compiled for again. What is left of this block is foretold by the latest one, and
        the more of its steps are done, by its own pace.
        """
        pace = (now - self._tuning_start) / (step - 1) if step > 1 else 0.0
        if not self._taken:
            return pace * (self._steps * (self._turns_left() + 1) - step + 1) if step > 1 else None
        usual = self._tuning_start - self._block_start + self._after_first
        if len(self._taken) > 1:
            usual = median(self._taken[1:])
        share = step / self._steps if step > 1 else 0.0
        by_pace = pace * (self._steps - step) + self._after_last
        by_latest = max(self._after_first - (now - self._tuning_start), 0.0)
        here = share * by_pace + (1 - share) * by_latest
        return here + usual * self._turns_left()

    def _turns_left(self) -> int:
        """How often this process has a block after the current one, or waits for others that have."""
        return (self._blocks - self._block) // self._abreast

    def end(self, index: int, path: str, stats: Mapping[str, Any]) -> BlockDone:
        """A block is finished."""
        now = time.monotonic()
        self._taken.append(now - self._block_start)
        self._after_first, self._after_last = now - self._tuning_start, now - self._step_end
        return BlockDone(index=index, path=path, seconds=self._taken[-1], **stats)

    def _elapsed(self) -> float:
        return time.monotonic() - self._start


class EvaluationMeter:
    """Turns the parts of an evaluation block by block into ``Progress`` events.

    Args:
        blocks: of all models together.
        logits: of how many blocks the time is that all tokens take after the last one: a guess, until some took theirs.
        memory: bytes held on the device.
        listen: where events go.
    """

    def __init__(
        self, blocks: int, logits: float, memory: Callable[[], int], listen: Callable[[Progress], None] | None
    ) -> None:
        self._blocks_left, self._logits_left, self._guess = blocks, 1.0, logits
        self._memory, self._listen = memory, listen
        self._start = self._last = time.monotonic()
        self._reported = self._took = self._logits_seconds = 0.0
        self._running, self._taken = False, list[float]()

    def block(self, name: str, block: int, blocks: int) -> None:
        """A block of a model begins."""
        self._end()
        self._running = True
        self._tell(Progress(phase="evaluation", block=block, blocks=blocks, message=f"{name}, block {block}/{blocks}"))

    def logits(self, name: str, done: int, tokens: int, share: float) -> None:
        """So many of a model's tokens are scored, and in all this share of what is scored in the end."""
        self._end()
        if done:
            self._logits_seconds, self._logits_left = self._logits_seconds + self._took, 1 - share
        if done in (0, tokens) or time.monotonic() - self._reported >= REPORT_SECONDS:
            self._tell(Progress(phase="evaluation", block=0, blocks=0, step=done, steps=tokens,
                                message=f"{name}, logits"))  # fmt: skip

    def _end(self) -> None:
        """What ran since the last event: a block, or tokens."""
        now = time.monotonic()
        self._took, self._last = now - self._last, now
        if self._running:
            self._running, self._blocks_left = False, self._blocks_left - 1
            self._taken.append(self._took)

    def _eta(self) -> float | None:
        """By the median of the blocks, of which the first may wait for files, and the pace of the tokens."""
        if not self._taken:
            return None
        usual, scored = median(self._taken[1:] or self._taken), 1 - self._logits_left
        all_logits = self._logits_seconds / scored if scored else self._guess * usual
        return usual * self._blocks_left + all_logits * self._logits_left

    def _tell(self, progress: Progress) -> None:
        self._reported = time.monotonic()
        if self._listen is not None:
            self._listen(replace(progress, seconds=self._reported - self._start, eta_seconds=self._eta(),
                                 memory_bytes=self._memory()))  # fmt: skip


def median(values: Sequence[float]) -> float:
    """The middle, or the mean of the two there; the module statistics takes a while to import."""
    ordered, count = sorted(values), len(values)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
