"""The fate of every weight of a run: as a GGUF file's recipe has it, or as the user's settings say."""

from collections.abc import Sequence

from autoround.export import no_codes
from autoround.formats.gguf.file import GgufFile, shapes_of
from autoround.formats.gguf.plan import plan_file
from autoround.model.blocks import embedding
from autoround.model.load import OpenModel
from autoround.plan import FormatRules, Plan, Structure, check_format
from autoround.recipe import Recipe
from autoround.resolve import resolve


def plan_run(recipe: Recipe, model: OpenModel, shape: Structure, format_rules: Sequence[FormatRules]) -> Plan:
    """Decide it, by configuration and shapes alone.

    Args:
        recipe: the settings.
        model: the opened model.
        shape: its layers.
        format_rules: of all formats that are asked for, which one grid serves.

    Raises:
        AutoRoundError: a format cannot hold what is asked for, or a setting names no layer.
    """
    if file_type := next((rule.file_type for rule in format_rules if rule.file_type), ""):
        plan = plan_file(file_type, shape, embedding(model.skeleton), model.config, shapes_of(model))
        for rule in format_rules:
            check_format(plan, rule)
        GgufFile(file_type=file_type, model=model, plan=plan, codes=no_codes).metadata()  # the tokenizer fits
        return plan
    return resolve(
        recipe.spec,
        recipe.odd_shapes,
        shape,
        format_rules,
        settings=recipe.layer_settings,
        head=recipe.quant_lm_head,
        nontext=recipe.quant_nontext_module,
    )
