"""``auto-round export``: formats from the journal of a finished run, or from a quantized checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoround.cli.grammar import Grammar
from autoround.cli.session import session
from autoround.errors import UsageError
from autoround.options import given, settings_of
from autoround.recipe import Recipe

SETTINGS = (
    "model",
    "revision",
    "cache_dir",
    "token",
    "trust_remote_code",
    "format",
    "output_dir",
    "overwrite",
    "max_shard_size",
    "model_dtype",
)
GRAMMAR = Grammar(
    program="auto-round export",
    usage="SOURCE --format LIST --output_dir FOLDER [flags]",
    description="Write formats from the journal of a finished run, or from a quantized checkpoint, code for code.",
    positional=("SOURCE", "the folder OUT.journal beside a run's output, or a checkpoint"),
    needed="one journal or checkpoint",
    settings=settings_of(Recipe, SETTINGS),
)


def run(values: Mapping[str, Any]) -> str:
    """Write what was asked for; the folders, one a line.

    Raises:
        AutoRoundError: nothing to export, or formats that cannot hold it.
    """
    if "positional" not in values:
        raise UsageError(
            "export: found nothing to export; needed the folder OUT.journal of a run, or a quantized checkpoint; "
            "try auto-round export --help"
        )
    source = values["positional"]
    if not any((Path(source) / name).is_file() for name in ("config.json", "manifest.json")):
        raise UsageError(
            f"export: {source}: found neither config.json nor manifest.json; needed a quantized checkpoint, or the "
            "folder OUT.journal of a run"
        )
    from autoround.cli.quantize import check

    unused = [name for name in ("model", "revision", "cache_dir", "token") if name in values]
    checkpoint = (Path(source) / "config.json").is_file()
    if unused and checkpoint:
        raise UsageError(f"export: found --{unused[0]} for a checkpoint; needed none: it is for journals; leave it out")
    recipe = Recipe(**given(values, SETTINGS))
    check(recipe)
    with session(values) as screen:
        from autoround.export import Target, export_checkpoint, export_journal

        target = Target(
            folder=Path(recipe.output_dir),
            formats=recipe.format,
            dtype=recipe.model_dtype,
            max_shard_size=recipe.max_shard_size,
            overwrite=recipe.overwrite,
        )

        def tell(name: str, folder: Path) -> None:
            if "quiet" not in values:
                screen.note(f"export: {name} in {folder}")

        if checkpoint:
            folders = export_checkpoint(source, target, trust_remote_code=recipe.trust_remote_code, on_format=tell)
        else:
            folders = export_journal(source, target, model=recipe.model or None, recipe=recipe, on_format=tell)
    return "\n".join(map(str, folders))
