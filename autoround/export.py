"""From codes to checkpoints: every format of a run, at its end or later from its journal alone."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autoround.convert import open_quantized
from autoround.errors import JournalError
from autoround.formats.contents import BlockCodes, Contents
from autoround.formats.gguf.file import GgufFile
from autoround.formats.registry import get_format, resolve_name, rules
from autoround.formats.writer import check_folder, checkpoint_files, parse_size, write_checkpoint, write_folder
from autoround.journal import MANIFEST, ORIGIN, SCALE_STEPS, Journal, read_manifest
from autoround.model.blocks import embedding
from autoround.model.experts import describe
from autoround.model.load import OpenModel, open_model
from autoround.plan import Plan, check_format
from autoround.recipe import Recipe
from autoround.resolve import recorded
from autoround.sealed import digest
from autoround.spec import spec_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where checkpoints go, and how.

    Attributes:
        folder: of a single format; several go to subfolders named after them.
        formats: names of layouts.
        dtype: "float16", …: of the unquantized weights where the layout demands none; their own when None.
        max_shard_size: largest size of one weight file.
        overwrite: replace what the folder holds.
    """

    folder: Path
    formats: tuple[str, ...]
    dtype: str | None = None
    max_shard_size: str = "5GB"
    overwrite: bool = False

    def check(self, plan: Plan) -> None:
        """Refuse what cannot be written, before any work.

        Raises:
            AutoRoundError: a format cannot hold the plan, or the folder is in use.
        """
        parse_size(self.max_shard_size)
        for name in self.formats:
            check_format(plan, rules(name))
        check_folder(self.folder, overwrite=self.overwrite)


def write_formats(
    model: OpenModel, plan: Plan, codes: BlockCodes, target: Target, *, on_format: Callable[[str, Path], None]
) -> tuple[Path, ...]:
    """Write a checkpoint for each format, and read each back.

    Args:
        model: the float model, for everything that is not quantized.
        plan: the fate of its layers.
        codes: number of a part of the plan -> codes of its layers.
        target: where to.
        on_format: called with name and folder before each.

    Returns:
        The folder of each format.

    Raises:
        AutoRoundError: see ``write_checkpoint``.
    """
    names = tuple(dict.fromkeys(map(resolve_name, target.formats)))
    several = len(names) > 1
    folders = tuple(target.folder / name.replace(":", "_") if several else target.folder for name in names)
    outputs = [_output(name, model, plan, codes, target) for name in names]
    for name, folder, output in zip(names, folders, outputs, strict=True):
        on_format(name, folder)
        if isinstance(output, GgufFile):
            _write_file(output, folder, overwrite=target.overwrite)
        else:
            write_checkpoint(output, folder, max_shard_size=target.max_shard_size, overwrite=target.overwrite)
    return folders


def weight_files(model: OpenModel, plan: Plan, target: Target) -> dict[str, dict[str, int]]:
    """What ``write_formats`` would write, but for configuration and tokenizer: format -> name of a file -> bytes.

    No weight is read and no code is asked for.

    Args:
        model: the float model.
        plan: the fate of its layers.
        target: where to, and which formats.

    Raises:
        AutoRoundError: a format cannot hold the plan.
    """
    found: dict[str, dict[str, int]] = {}
    for name in map(resolve_name, target.formats):
        output = _output(name, model, plan, no_codes, target)
        if isinstance(output, GgufFile):
            found[name] = output.weight_files()
        else:
            found[name] = checkpoint_files(output, max_shard_size=target.max_shard_size)
    return found


def _output(name: str, model: OpenModel, plan: Plan, codes: BlockCodes, target: Target) -> GgufFile | Contents:
    """What a format is written from."""
    if file_type := rules(name).file_type:
        file = GgufFile(file_type=file_type, model=model, plan=plan, codes=codes)
        file.check()
        return file
    dtype = target.dtype or ("float16" if model.gguf_file else None)
    return Contents(model=model, plan=plan, codes=codes, form=get_format(name).suited(plan), dtype=dtype)


def no_codes(index: int) -> dict[str, Any]:
    """The codes of a part while there are none."""
    raise IndexError(f"part {index}: found no codes yet")


def _write_file(file: GgufFile, folder: Path, *, overwrite: bool) -> None:
    write_folder(
        folder,
        lambda partial: file.write(partial / file.name),
        lambda partial: file.verify(partial / file.name),
        needed=file.nbytes,
        overwrite=overwrite,
    )


def export_checkpoint(
    checkpoint: str | Path,
    target: Target,
    *,
    trust_remote_code: bool = False,
    on_format: Callable[[str, Path], None] = lambda name, folder: None,
) -> tuple[Path, ...]:
    """Write a quantized checkpoint anew in other layouts, code for code.

    Args:
        checkpoint: a folder in any layout that this package reads.
        target: where to, and which formats.
        trust_remote_code: run Python code that comes with the model.
        on_format: called with name and folder before each format is written.

    Returns:
        The folder of each format.

    Raises:
        AutoRoundError: the checkpoint is damaged or foreign, or a format cannot hold exactly its codes.
    """
    for name in target.formats:
        rules(name)
    quantized = open_quantized(Path(checkpoint), trust_remote_code=trust_remote_code)
    target.check(quantized.plan)
    return write_formats(quantized.model, quantized.plan, quantized.read_block, target, on_format=on_format)


def origin(model: object, **options: Any) -> dict[str, Any] | None:
    """What the journal keeps of where its model came from: enough to open it again; None for one in memory."""
    if not isinstance(model, str | Path):
        return None
    local = Path(model).expanduser()
    return {"model": str(local.resolve() if local.exists() else model), **options}


def export_journal(
    journal: str | Path,
    target: Target,
    *,
    model: Any = None,
    tokenizer: Any = None,
    recipe: Recipe | None = None,
    on_format: Callable[[str, Path], None] = lambda name, folder: None,
) -> tuple[Path, ...]:
    """Write checkpoints from a finished journal, without the run that made it.

    Args:
        journal: the folder ``OUT.journal`` of a run whose blocks are all done.
        target: where to, and which formats, each able to hold the codes.
        model: the float model that was quantized; where it came from then when None.
        tokenizer: for a model in memory.
        recipe: its revision, cache_dir, token and trust_remote_code tell how to open the model; those of the run that
            made the journal hold where they are not given.
        on_format: called with name and folder before each format is written.

    Returns:
        The folder of each format.

    Raises:
        AutoRoundError: the journal is not finished, its model is gone or another one, or a format cannot hold it.
    """
    folder = Path(journal)
    for name in target.formats:
        rules(name)
    manifest = read_manifest(folder)
    if missing := sorted({"plan", "spec", "source_sha256"} - set(manifest)):
        raise JournalError(f"{folder / MANIFEST}: found no {missing[0]}; needed the manifest of a run by this version")
    kept = manifest.get(ORIGIN) or {}
    if model is None and not kept:
        raise JournalError(f"{folder}: found the codes of a model in memory; needed that model; pass it as --model")
    options, given = kept if model is None or model == kept.get("model") else {}, recipe or Recipe()
    opened = open_model(
        options.get("model", model),
        revision=given.revision or options.get("revision"),
        cache_dir=given.cache_dir or options.get("cache_dir"),
        trust_remote_code=given.trust_remote_code or options.get("trust_remote_code", False),
        token=given.token,
        tokenizer=tokenizer,
    )
    plan = _planned(manifest, opened)
    codes = Journal(folder, manifest)
    if (finished := codes.finished()) < len(plan.parts):
        raise JournalError(
            f"{folder}: found {finished} of {len(plan.parts)} blocks; needed all; repeat the command that began it"
        )
    if codes.scale_steps() != manifest.get(SCALE_STEPS, 0):
        raise JournalError(
            f"{folder}: found blocks whose scales are not tuned yet; needed those of {manifest[SCALE_STEPS]} steps; "
            "repeat the command that began it"
        )
    target.check(plan)
    if digest((name, opened.source.read(name)) for name in sorted(opened.source.names())) != manifest["source_sha256"]:
        raise JournalError(
            f"{opened.name}: found other weights than those that were quantized; needed the same; pass --model"
        )
    return write_formats(opened, plan, codes.read_block, target, on_format=on_format)


def _planned(manifest: dict[str, Any], model: OpenModel) -> Plan:
    """The plan that a journal's codes were made by."""
    specs = {path: spec_of(settings) for path, settings in manifest["plan"].items()}
    shape, tokens = describe(model.skeleton), embedding(model.skeleton)
    if not specs:  # what is kept whole has no parts in the journal
        shape = replace(shape, blocks=())
    if tokens.path in specs:
        shape = replace(shape, outside=(tokens, *shape.outside))
    return recorded(shape, spec_of(manifest["spec"]), specs)
