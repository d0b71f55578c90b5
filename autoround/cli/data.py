"""``auto-round data``: what a dataset would calibrate on, before anything is quantized."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autoround.cli.grammar import Grammar, word_or_flag
from autoround.cli.session import session
from autoround.data.language import parse_specs
from autoround.errors import UsageError
from autoround.options import given, option, settings_of
from autoround.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from autoround.cli.display import Display
    from autoround.model.sample import Sampler
    from autoround.model.unopened import Unopened

SETTINGS = (
    "model",
    "revision",
    "cache_dir",
    "token",
    "trust_remote_code",
    "dataset",
    "nsamples",
    "seqlen",
    "seed",
    "device_map",
)
EPILOG = """\
examples:
  auto-round data python-docs --model Qwen/Qwen3-0.6B
  auto-round data "a.jsonl,org/chats:num=64:split=train" --model ./m --show 5
  auto-round data self:num=8 --model ./model --seqlen 256
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What is no setting of a run."""

    show: int = option(3, "rows to print as text", "command")


GRAMMAR = Grammar(
    program="auto-round data",
    usage="SPEC --model MODEL [flags]",
    description="Read calibration data as a run would: what is read, kept and dropped, and the first rows as text.",
    epilog=EPILOG,
    positional=("SPEC", "the same as --dataset"),
    needed="one dataset in quotes",
    settings=settings_of(Recipe, SETTINGS) | settings_of(Shown),
)


def run(values: Mapping[str, Any]) -> str:
    """Read the data; the explanation.

    Raises:
        AutoRoundError: no model, or data that would stop a run.
    """
    settings = given(values, SETTINGS)
    if (named := word_or_flag(values, "dataset")) is not None:
        settings["dataset"] = named
    recipe, shown = Recipe(**settings), Shown(**given(values, settings_of(Shown)))
    if not recipe.model:
        raise UsageError("data: found no model; needed one for its tokenizer; give --model")
    if shown.show < 0:
        raise UsageError(f"show: found {shown.show}; needed at least 0")
    writes = recipe.dataset is not None and any(spec.name == "self" for spec in parse_specs(recipe.dataset))
    with session(values, recipe.model) as screen:
        from autoround.data.explain import explain

        tokenizer = _tokenizer(recipe)
        writer = _writer(recipe, screen, quiet="quiet" in values) if writes else _unopened(recipe, tokenizer)
        return str(
            explain(
                recipe.dataset,
                tokenizer,
                nsamples=recipe.nsamples,
                seqlen=recipe.seqlen,
                seed=recipe.seed,
                samples=shown.show,
                writer=writer,
            )
        )


def _tokenizer(recipe: Recipe) -> "PreTrainedTokenizerBase":
    from autoround.model.tokenizer import open_tokenizer

    return open_tokenizer(
        recipe.model,
        revision=recipe.revision,
        cache_dir=recipe.cache_dir,
        token=recipe.token,
        trust_remote_code=recipe.trust_remote_code,
    )


def _unopened(recipe: Recipe, tokenizer: "PreTrainedTokenizerBase") -> "Unopened":
    """The model, for its processor where there are images."""
    from autoround.model.unopened import Unopened

    return Unopened(
        recipe.model,
        tokenizer,
        revision=recipe.revision,
        cache_dir=recipe.cache_dir,
        token=recipe.token,
        trust_remote_code=recipe.trust_remote_code,
    )


def _writer(recipe: Recipe, screen: "Display", *, quiet: bool) -> "Sampler":
    """The model, which writes the rows of ``self`` as it would in a run."""
    from autoround.backends.base import select
    from autoround.model.load import open_model
    from autoround.model.sample import Sampler

    backend, device = select(recipe.device_map)
    model = open_model(
        recipe.model,
        revision=recipe.revision,
        cache_dir=recipe.cache_dir,
        token=recipe.token,
        trust_remote_code=recipe.trust_remote_code,
        attn_implementation=backend.attention(recipe.seqlen),
    )

    def tell(done: int, total: int) -> None:
        if not quiet:
            screen.note(f"writing text: {done} of {total} tokens")

    return Sampler(model, device=device, dtype=backend.compute_dtype(), on_progress=tell)
