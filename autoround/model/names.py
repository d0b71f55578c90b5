"""Tensor names: a checkpoint's are not always the module's, since transformers renames some while loading."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from autoround.errors import ModelError
from autoround.log import LOGGER

# Buffers that older checkpoints hold and models now compute.
_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


def match_names(skeleton: PreTrainedModel, keys: Iterable[str], where: str) -> dict[str, str]:
    """Find the module name of every tensor of a checkpoint, by the rules of ``from_pretrained``.

    Tensors that the model does not have are left out, with a warning if they matter.

    Args:
        skeleton: the model.
        keys: names in the checkpoint.
        where: the checkpoint, for messages.

    Returns:
        Module name -> checkpoint name, in the checkpoint's order.

    Raises:
        ModelError: a module's tensor is merged from, or split off, differently stored ones (fused experts).
    """
    transforms = get_model_conversion_mapping(skeleton)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    own, prefix = skeleton.state_dict(), skeleton.base_model_prefix
    names, unknown = {}, []
    for key in keys:
        name, converted = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key in own:
            name, converted = key, None
        if name in own and converted is not None:
            raise ModelError(
                f"{where}: found {key}, which the model merges or splits into {name}; needed one tensor per parameter; "
                "mixture-of-experts and other merged checkpoints are not supported yet"
            )
        if name in own:
            names[name] = key
        else:
            unknown.append(key)
    ignored = re.compile("|".join((*(skeleton._keys_to_ignore_on_load_unexpected or ()), *_COMPUTED)))
    if left_out := [key for key in unknown if not ignored.search(key)]:
        LOGGER.warning(
            "%s: left out %d tensors that the model does not have, such as %s", where, len(left_out), left_out[0]
        )
    return names


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
