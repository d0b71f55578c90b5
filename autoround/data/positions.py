"""How long rows of text can be: no longer than the positions that a model knows."""

from dataclasses import replace
from typing import Any

from autoround.log import LOGGER
from autoround.recipe import Recipe


def within_positions(recipe: Recipe, config: Any) -> Recipe:
    """The recipe; with shorter rows, and a warning, where it asks for longer ones than the model can take.

    Args:
        recipe: the settings.
        config: of the model, as transformers has it.
    """
    known = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not (recipe.needs_data and isinstance(known, int) and 0 < known < recipe.seqlen):
        return recipe
    LOGGER.warning("seqlen: found %d; the model knows %d positions; rows are as long as that", recipe.seqlen, known)
    return replace(recipe, seqlen=known)
