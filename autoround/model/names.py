"""Tensor names: a checkpoint's are not always the module's, since transformers renames and stacks some."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    Transpose,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from autoround.errors import ModelError
from autoround.log import LOGGER
from autoround.model.skeleton import sees_images

# Buffers that older checkpoints hold and models now compute.
_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


# A name of ``LayerShape.pieces``.
_PIECE = re.compile(r"(.+)\.\d+\.([^.]+)\.weight")

# For every expert of a stack the names of the matrices whose rows lie one below the other in it.
Pieces: TypeAlias = tuple[tuple[str, ...], ...]


class Matched(NamedTuple):
    """Where the tensors of a model are in a checkpoint.

    Attributes:
        single: module name -> checkpoint name, of tensors that are stored as the module has them.
        stacked: module name -> checkpoint names of the matrices of a stack of experts.
        extra: checkpoint names of tensors of modules that the model does not have, such as heads for more tokens.
        turnable: module names of stacks that are stored either as the module has them or with their last axes swapped.
    """

    single: dict[str, str]
    stacked: dict[str, Pieces]
    extra: tuple[str, ...] = ()
    turnable: frozenset[str] = frozenset()


def match_names(skeleton: PreTrainedModel, keys: Iterable[str], where: str) -> Matched:
    """Find the module name of every tensor of a checkpoint, by the rules of ``from_pretrained``.

    Tensors that the model does not have are left out, with a warning if they matter, or extra if they are of other
    modules than those of the model.

    Args:
        skeleton: the model.
        keys: names in the checkpoint.
        where: the checkpoint, for messages.

    Returns:
        Names in the checkpoint's order.

    Raises:
        ModelError: experts are missing, or a tensor is made of stored ones in another way than by stacking experts.
    """
    renamings, converters = _transforms(skeleton)
    own, prefix = skeleton.state_dict(), skeleton.base_model_prefix
    single: dict[str, str] = {}
    parts: dict[str, dict[str, list[str]]] = {}
    unknown, turnable = [], set()
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key in own:
            name, pattern = key, None
        if name not in own and (piece := _PIECE.fullmatch(name)) and (whole := f"{piece[1]}.{piece[2]}") in own:
            parts.setdefault(whole, {whole: []})[whole].append(key)
        elif name not in own:
            unknown.append(key)
        elif pattern is None:
            single[name] = key
        else:
            converter = next(each for each in converters if pattern in each.source_patterns)
            if _may_turn(converter):
                single[name] = key
                turnable.add(name)
                continue
            if not _stacks(converter):
                raise ModelError(
                    f"{where}: found {key}, which the model merges or splits into {name}; needed one tensor per "
                    "parameter, or experts to stack; this checkpoint is not supported yet"
                )
            parts.setdefault(name, {each: [] for each in converter.source_patterns})[pattern].append(key)
    stacked = {name: _pieces(found, len(own[name]), f"{where}: {name}") for name, found in parts.items()}
    return Matched(single, stacked, _extra(skeleton, unknown, where), frozenset(turnable))


def written_names(skeleton: PreTrainedModel) -> Matched:
    """Under what names checkpoints hold the tensors of a model that sees images, or whose experts they do not stack, as
    ``save_pretrained`` writes them; nothing for other models, whose names are the module's."""
    renamings, converters = _transforms(skeleton, legacy=False)
    stacked_by = (each.reverse_transform() for each in converters[::-1] if _stacks(each))
    stacking = [each for each in stacked_by if isinstance(each, WeightConverter)]
    renamed_by = (each.reverse_transform() for each in renamings[::-1] if not isinstance(each, PrefixChange))
    back = [each for each in renamed_by if isinstance(each, WeightRenaming)]
    single, stacked = {}, {}
    for name, tensor in skeleton.state_dict().items():
        first, pattern = apply_converters(name, stacking)
        if pattern is None:
            single[name] = apply_renamings(name, back)
            continue
        targets = next(each for each in stacking if pattern in each.source_patterns).target_patterns
        patterns = [first.replace(targets[0], target) for target in targets]
        stacked[name] = tuple(
            tuple(apply_renamings(each.replace("*", str(expert)), back) for each in patterns)
            for expert in range(len(tensor))
        )
    return Matched(single, stacked) if stacked or sees_images(skeleton.config) else Matched({}, {})


def _transforms(
    skeleton: PreTrainedModel, *, legacy: bool = True
) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """What transformers does to names, and to tensors, while loading."""
    transforms = get_model_conversion_mapping(skeleton, add_legacy=legacy)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    return renamings, [each for each in transforms if isinstance(each, WeightConverter)]


def _stacks(converter: WeightConverter) -> bool:
    """Whether it stacks the matrices of experts, and lays those of one expert one below the other."""
    kinds = [(type(each), each.dim) for each in converter.operations
             if isinstance(each, MergeModulelist | Concatenate)]  # fmt: skip
    whole = len(kinds) == len(converter.operations)
    return whole and kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def _may_turn(converter: WeightConverter) -> bool:
    """Whether it swaps the last axes of one stack of experts where they do not fit as they are."""
    kinds = [(each.dim0, each.dim1, each.check_dims) for each in converter.operations if isinstance(each, Transpose)]
    return kinds == [(1, 2, True)] and len(converter.operations) == len(converter.source_patterns) == 1


def _pieces(parts: Mapping[str, Sequence[str]], experts: int, where: str) -> Pieces:
    """The keys of every part in the order of experts, by expert."""
    for pattern, keys in parts.items():
        if len(keys) != experts:
            raise ModelError(
                f"{where}: found {len(keys)} tensors named as in {pattern}; needed one for each of {experts} experts; "
                "download the checkpoint again"
            )
    return tuple(zip(*(sorted(keys, key=dot_natural_key) for keys in parts.values()), strict=True))


def _extra(skeleton: PreTrainedModel, unknown: Iterable[str], where: str) -> tuple[str, ...]:
    """Those of modules that the model does not have; a warning tells of the others."""
    computed, ignored = (
        re.compile("|".join(each)) for each in (_COMPUTED, (*(skeleton._keys_to_ignore_on_load_unexpected or ()), "$^"))
    )
    modules, extra, left_out = {name for name, _ in skeleton.named_modules()}, [], []
    for key in unknown:
        owner = key.rpartition(".")[0]
        if computed.search(key):
            continue
        if not modules.intersection((owner, f"{skeleton.base_model_prefix}.{owner}")):
            extra.append(key)
        elif not ignored.search(key):
            left_out.append(key)
    if left_out:
        LOGGER.warning(
            "%s: left out %d tensors that the model does not have, such as %s", where, len(left_out), left_out[0]
        )
    return tuple(extra)


def add_tied(skeleton: PreTrainedModel, stored: Mapping[str, str]) -> dict[str, str]:
    """The same names and those of weights tied to a stored one.

    Args:
        skeleton: the model, its tied parameters being one object.
        stored: module name -> checkpoint name.
    """
    groups: dict[int, list[str]] = defaultdict(list)
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    names = dict(stored)
    for group in groups.values():
        keys = [stored[name] for name in group if name in stored]
        names.update({name: keys[0] for name in group if keys and name not in stored})
    return names
