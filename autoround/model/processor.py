"""The processor of a model that sees images: what turns messages and images into token ids and pixels."""

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedConfig, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, AutoProcessor
from transformers.utils import is_torchvision_available

from autoround.errors import ModelError

BLIND = "found rows with images; needed a model that sees them; leave the images out, or name a column of text"
_VIDEO = "video_processor"


def open_processor(folder: Path, config: PreTrainedConfig, *, trust_remote_code: bool = False) -> ProcessorMixin:
    """Load a model's own processor; where torchvision is missing, without the part that reads videos.

    Args:
        folder: the model's.
        config: its configuration.
        trust_remote_code: run Python code that comes with the processor.

    Raises:
        ModelError: there is none, or it cannot be loaded; says what transformers says.
    """
    try:
        kind = PROCESSOR_MAPPING.get(type(config), None)
        if kind is None or is_torchvision_available() or _VIDEO not in kind.get_attributes():
            loaded: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        else:
            loaded = _without_videos(kind, folder)
    except (ValueError, OSError, KeyError, ImportError, TypeError, AttributeError) as error:
        line = " ".join(str(error).split())
        raise ModelError(
            f"{folder}: found no processor that loads ({line}); needed one for images; install what it asks for, or "
            "calibrate with text alone"
        ) from error
    if not isinstance(loaded, ProcessorMixin):
        raise ModelError(
            f"{folder}: found only a {type(loaded).__name__}; needed a processor of images and text; add its files, "
            "such as preprocessor_config.json"
        )
    return loaded


def _without_videos(kind: type[ProcessorMixin], folder: Path) -> ProcessorMixin:
    """A processor whose part for videos, which needs torchvision, is None."""

    def check(self: ProcessorMixin, name: str, argument: Any) -> Any:
        return type(None) if name == _VIDEO else kind.check_argument_for_proper_class(self, name, argument)

    blind = type(kind.__name__, (kind,), {"check_argument_for_proper_class": check, "__init__": kind.__init__})
    loaders = {_VIDEO: lambda _: None, "tokenizer": AutoTokenizer.from_pretrained,
               "image_processor": AutoImageProcessor.from_pretrained}  # fmt: skip
    parts = [loaders[name](folder) for name in kind.get_attributes()]
    settings, _ = kind.get_processor_dict(folder)
    made: ProcessorMixin = blind.from_args_and_dict(parts, settings)
    return made
