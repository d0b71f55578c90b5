"""An engine that computes nothing, for the commands to drive."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from autoround.forecast.types import BlockNeed, Forecast, Memory, Room, Seconds, Shortage
from autoround.log import LOGGER
from autoround.plan import BlockPlan, LayerPlan, LayerShape, Plan
from autoround.progress import BlockDone, Progress
from autoround.recipe import Recipe
from autoround.spec import QuantSpec


def plan(blocks: int = 2) -> Plan:
    """A plan with one layer quantized and one kept in each block, and a head outside."""

    def block(path: str) -> BlockPlan:
        tuned = LayerPlan(shape=LayerShape(path=f"{path}.up", out_features=64, in_features=32), spec=QuantSpec())
        kept = LayerPlan(shape=LayerShape(path=f"{path}.odd", out_features=8, in_features=7), spec=None, reason="odd")
        return BlockPlan(path=path, layers=(tuned, kept))

    head = LayerShape(path="lm_head", out_features=100, in_features=32)
    return Plan(
        architecture="StubForCausalLM",
        spec=QuantSpec(),
        blocks=tuple(block(f"layers.{index}") for index in range(blocks)),
        outside=(LayerPlan(shape=head, spec=None, reason="outside the blocks"),),
        notes=("worth telling",),
    )


@dataclass
class StubRun:
    """A run that reports two blocks, the first of them resumed."""

    recipe: Recipe
    on_progress: Callable[[Progress], None] | None
    failure: BaseException | None
    plan: Plan = field(default_factory=plan)

    def __iter__(self) -> Iterator[BlockDone]:
        self._tell(Progress(phase="calibration", block=0, blocks=2, message="reading text"))
        LOGGER.warning("less text than asked")
        LOGGER.debug("for the curious")
        yield BlockDone(index=0, path="layers.0", loss_first=2.0, loss_best=1.0, resumed=True)
        if self.failure is not None:
            raise self.failure
        self._tell(Progress(phase="tuning", block=2, blocks=2, step=1, steps=4, loss_first=2.0, loss=2.0))
        self._tell(
            Progress(
                phase="tuning",
                block=2,
                blocks=2,
                step=3,
                steps=4,
                loss_first=2.0,
                loss=0.5,
                tokens_per_second=1234.5,
                eta_seconds=3725,
                memory_bytes=1_500_000_000,
            )  # fmt: skip
        )
        yield BlockDone(index=1, path="layers.1", loss_first=2.0, loss_best=0.5, loss_last=0.6, seconds=12.34)

    def export(self) -> tuple[Path, ...]:
        self._tell(Progress(phase="export", block=2, blocks=2, message="auto_round in out"))
        return (Path(self.recipe.output_dir),)

    def _tell(self, progress: Progress) -> None:
        if self.on_progress is not None:
            self.on_progress(progress)


@dataclass
class StubEngine:
    """Takes the place of ``autoround.engine.quantize_each`` and remembers what it was asked."""

    failure: BaseException | None = None
    failure_at_once: BaseException | None = None
    asked: list[Recipe] = field(default_factory=list)

    def __call__(
        self, model: str, recipe: Recipe, *, on_progress: Callable[[Progress], None] | None = None
    ) -> list[StubRun]:
        assert model == recipe.model
        self.asked.append(recipe)
        if self.failure_at_once is not None:
            raise self.failure_at_once
        return [StubRun(recipe, on_progress, self.failure)]


def foretell(recipe: Recipe, *, probe: bool = True) -> tuple[Forecast, ...]:
    """Takes the place of ``autoround.forecast.foretell.foretell``: a run that does not fit."""
    need = BlockNeed(paths=("layers.0", "layers.1"), host=300_000_000, device=0, codes=500_000)
    flags = ("--batch_size 4", "--gradient_accumulate_steps 2")
    return (
        Forecast(
            plan=plan(),
            formats=recipe.format,
            numerics="cpu, bfloat16, eager attention, uncompiled steps",
            files={"auto_round": {"model.safetensors": 1_234_567}},
            memory=Memory(process=400_000_000, activations=100_000_000, slots=200_000_000, blocks=(need,),
                          others=2_000_000, outside_codes=0, host=1_500_000_000, device=0),
            disk=101_000_000,
            seconds=Seconds(step=0.5, block=101, compiling=30, around=100, total=332) if probe else None,
            room=Room(host=1_000_000_000, host_limit="its control group", device=None, disk=2_000_000_000),
            shortages=(Shortage(what="memory", needed=1_500_000_000, free=1_000_000_000, flags=flags),),
        ),
    )  # fmt: skip
