"""``AutoRound`` as Intel's users call it, over ``quantize_each``."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypedDict

from torch import nn

from autoround.data.language import did_you_mean
from autoround.engine import Run, quantize_each
from autoround.errors import UsageError
from autoround.formats.registry import resolve_name
from autoround.hub import load
from autoround.intel.adopt import adopt
from autoround.intel.batches import rows
from autoround.intel.words import DEPENDENT, FALSE, REFUSED, SYNONYMS, TAKEN
from autoround.log import LOGGER
from autoround.options import settings_of
from autoround.recipe import Recipe

if TYPE_CHECKING:
    from typing_extensions import Unpack

OUTPUT_DIR = "tmp_autoround"
TEXTS = ("device_map", "output_dir")
THEIRS = frozenset((*TAKEN, *DEPENDENT, *SYNONYMS, *REFUSED))


class Settings(TypedDict, total=False):
    """The arguments most used; any other field of ``Recipe`` is one too. None leaves one as it is."""

    scheme: str | Mapping[str, Any] | None
    bits: int | None
    group_size: int | None
    sym: bool | None
    layer_config: Mapping[str, Any] | None
    ignore_layers: str | Sequence[str] | None
    quant_lm_head: bool
    format: str | Sequence[str] | None
    dataset: Any
    nsamples: int | None
    seqlen: int | None
    batch_size: int | None
    seed: int | None
    iters: int | None
    lr: float | None
    minmax_lr: float | None
    gradient_accumulate_steps: int | None
    device_map: str | int | None
    low_gpu_mem_usage: bool
    enable_torch_compile: bool | None
    output_dir: str | Path
    overwrite: bool


class Result(Sequence[Any]):
    """A model and what belongs to it, as a pair; the model is loaded when it is first looked at."""

    def __init__(self, load_model: Callable[[], nn.Module], other: object) -> None:
        self._load, self._other = load_model, other
        self._model: nn.Module | None = None

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: Any) -> Any:
        if index in (1, -1):
            return self._other
        if index not in (0, -2):
            raise IndexError(f"found index {index}; needed 0, the model, or 1")
        self._model = self._model or self._load()
        return self._model


class AutoRound:
    """Quantize a model by learned rounding, called as in ``auto_round``.

    Args:
        model: hub name, folder, .gguf file, or a transformers model in memory, which is not changed.
        tokenizer: an object or a name; a model on disk has its own.
        settings: fields of ``Recipe``, and what ``auto_round`` has beside them where it means something here. The
            dataset may also be a DataLoader, or any iterable of batches of token ids or texts.

    Raises:
        UsageError: a value out of range, or an argument of ``auto_round`` that is not taken; says what to use.
        TypeError: an argument that neither has.
    """

    def __init__(self, model: str | Path | nn.Module, tokenizer: Any = None, **settings: "Unpack[Settings]") -> None:
        asked: dict[str, Any] = dict(settings)
        if isinstance(scheme := asked.get("scheme"), Mapping):
            asked = {**scheme, **asked, "scheme": None}
        given, self._theirs = _part(asked)
        if "format" in given:
            given["format"] = _names(given["format"])
        if "dataset" in given:
            given["dataset"] = rows(given["dataset"], given.get("nsamples", Recipe().nsamples))
        named = "" if isinstance(model, nn.Module) else str(model)
        self.model, self.tokenizer = model, tokenizer
        self._given = {"model": named, "output_dir": OUTPUT_DIR, **given}
        self._runs: tuple[Run, ...] = ()
        adopted, notes = adopt(self._given, self._theirs)
        self.recipe = Recipe(**adopted)
        for note in notes:
            LOGGER.warning("AutoRound: %s", note.removeprefix("--"))

    def quantize(self) -> Result:
        """Tune all blocks.

        Returns:
            The model with quantized weights, in floating point, and the settings of every quantized layer. The model is
            loaded only if it is looked at; a model given in memory is not changed.
        """
        self._runs = quantize_each(self.model, self.recipe, tokenizer=self.tokenizer)
        for run in self._runs:
            for _ in run:
                pass
        first = self._runs[0]
        layers = {
            path: {"bits": spec.bits, "group_size": spec.group_size, "sym": spec.sym}
            for path, spec in first.plan.specs.items()
        }
        return Result(lambda: _floats(first), layers)

    def save_quantized(
        self, output_dir: str | Path | None = None, format: str | Sequence[str] | None = None, inplace: bool = True
    ) -> Result:
        """Write what ``quantize`` made.

        Args:
            output_dir: the recipe's when not given.
            format: comma list; the recipe's when not given, and able to hold the codes that were made.
            inplace: without effect: nothing is changed in place.

        Returns:
            The model, as ``autoround.load`` reads it from the first folder if it is looked at, and the folder or the
            list of folders.
        """
        del inplace
        if not self._runs:
            return self.quantize_and_save(output_dir or self.recipe.output_dir, format)
        formats = _names(format) if format else None
        if (
            formats
            and len(self._runs) > 1
            and set(map(resolve_name, formats)) != set(map(resolve_name, self.recipe.format))
        ):
            raise UsageError(
                f"format: found {', '.join(formats)}; needed {', '.join(self.recipe.format)}, what quantize was asked "
                "for: they have grids of their own; leave it out or quantize for other formats"
            )
        target, home = Path(output_dir or self.recipe.output_dir), Path(self.recipe.output_dir)
        folders: list[Path] = []
        for run in self._runs:
            own = target / Path(run.recipe.output_dir).relative_to(home)
            folders += run.export(own, formats=formats if len(self._runs) == 1 else None)
        for folder in folders:
            if hasattr(self.tokenizer, "save_pretrained") and (folder / "config.json").is_file():
                self.tokenizer.save_pretrained(folder)
        return Result(lambda: load(folders[0]), str(folders[0]) if len(folders) == 1 else list(map(str, folders)))

    def quantize_and_save(
        self,
        output_dir: str | Path | None = None,
        format: str | Sequence[str] | None = None,
        inplace: bool = True,
        max_shard_size: int | str | None = None,
    ) -> Result:
        """Tune all blocks and write the formats; arguments and result are those of ``save_quantized``.

        Finished blocks are kept beside the output folder: an interrupted call, repeated, goes on where it stopped.
        """
        del inplace
        changed: dict[str, Any] = {} if output_dir is None else {"output_dir": str(output_dir)}
        if format:
            changed["format"] = _names(format)
        if max_shard_size:
            changed["max_shard_size"] = str(max_shard_size)
        self.recipe = Recipe(**adopt(self._given | changed, self._theirs).settings)
        self.quantize()
        return self.save_quantized()


def _names(formats: str | Sequence[str]) -> tuple[str, ...]:
    listed = formats.strip("[] ").split(",") if isinstance(formats, str) else formats
    return tuple(dict.fromkeys(name.strip().lower() for name in listed if name.strip()))


def _floats(run: Run) -> nn.Module:
    """The model of a finished run with dequantized weights."""
    with TemporaryDirectory() as folder:
        run.export(folder, formats=["fake"])
        return load(folder)


def _part(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, object]]:
    """Fields of ``Recipe``, by whatever name, and arguments that are only Intel's."""
    known = settings_of(Recipe)
    fields = {flag: name for name, each in known.items() for flag in (name, *each.option["flags"])}
    off_flags = {flag: name for name, each in known.items() for flag in each.option["off_flags"]}
    settings: dict[str, Any] = {}
    theirs: dict[str, object] = {}
    for name, value in given.items():
        if value is None:
            continue
        if name in fields:
            settings[fields[name]] = str(value) if fields[name] in TEXTS else value
        elif name in off_flags:
            settings[off_flags[name]] = not value
        elif name not in THEIRS:
            near = did_you_mean(name, (*fields, *THEIRS))
            raise TypeError(f"AutoRound() got an unexpected keyword argument {name!r}{near}")
        elif value is not False:
            theirs[name] = value
        elif name in FALSE:
            theirs[FALSE[name]] = True
    return settings, theirs
