"""Structures to plan for, and settings, rows and formats to draw."""

from hypothesis import strategies as st

from autoround.formats.rules import RULES
from autoround.plan import BlockShape, FormatRules, LayerShape, Structure
from autoround.resolve import FITTING_GROUP_SIZES
from autoround.spec import BITS, QuantSpec

FREE = FormatRules(name="free")
UNIFORM = FormatRules(name="uniform", uniform_group=True, mixed=False)


def structure(*rows: int, blocks: int = 2, out_features: int = 64) -> Structure:
    """Blocks of layers ``0``, ``1``, … whose rows are this long, and a tied head."""
    return Structure(
        architecture="Tiny",
        blocks=tuple(
            BlockShape(
                path=f"model.layers.{block}",
                layers=tuple(
                    LayerShape(path=f"model.layers.{block}.{index}", out_features=out_features, in_features=row)
                    for index, row in enumerate(rows)
                ),
            )
            for block in range(blocks)
        ),
        outside=(LayerShape(path="lm_head", out_features=100, in_features=rows[0], tied_to="model.embed"),),
    )


RULE_SETS = st.lists(st.sampled_from([*RULES.values(), FREE, UNIFORM]), min_size=1, max_size=3)
SPECS = st.builds(
    QuantSpec,
    bits=st.sampled_from(BITS),
    group_size=st.one_of(st.just(-1), st.integers(1, 300), st.sampled_from(FITTING_GROUP_SIZES)),
    sym=st.booleans(),
)
ROWS = st.lists(st.integers(1, 40).map(lambda factor: 16 * factor), min_size=1, max_size=4)
