"""Transformers integration: loading quantized folders with packed linear layers.

Which layers are packed, their bits, group sizes and scale dtypes are read from the checkpoint's own tensors;
the quantization config only decides how zero points are stored.
"""

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from autoround.errors import FormatError, ModelError
from autoround.formats.bits import PERIOD
from autoround.formats.gguf.container import read_tensors
from autoround.formats.packed import PackedLinear, StoredLinear
from autoround.formats.packed_experts import PackedExperts
from autoround.formats.stored import METHODS, Stored, stored
from autoround.model.buffers import refill
from autoround.model.gguf import open_gguf, read_config
from autoround.model.gguf_rope import rope_of
from autoround.model.load import gguf_file
from autoround.model.names import Pieces, match_names
from autoround.model.oddities import mark_experts
from autoround.model.skeleton import auto_class
from autoround.model.source import read_header


class PackedConfig(QuantizationConfigMixin):
    """A ``quantization_config`` kept as it was read."""

    def __init__(self, **settings: Any) -> None:
        vars(self).update(settings)


class PackedQuantizer(HfQuantizer):
    """Replaces the layers whose packed tensors a checkpoint holds by ``PackedLinear``."""

    requires_calibration = True  # transformers' name for: reads quantized checkpoints, makes none
    _repacked = False

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, *, checkpoint_files: Iterable[str | Path] | None = None, **kwargs: Any
    ) -> None:
        del kwargs  # transformers passes more than is needed
        files = [Path(file) for file in checkpoint_files or ()]
        where = str(files[0].parent) if files else "model"
        layout = stored(self.quantization_config.to_dict(), where)
        tensors = layout.layers({name: head for file in files for name, head in read_header(file).items()})
        if not tensors:
            raise FormatError(f"{where}: found no packed layers; needed tensors named {', '.join(layout.needed)}")
        names = match_names(model, (f"{key}.weight" for key in tensors), where)
        for name, key in names.single.items():
            path = name.removesuffix(".weight")
            layer = _layer(model.get_submodule(path), tensors[key.removesuffix(".weight")], layout, path)
            model.set_submodule(path, layer)
            _skip_initialization(layer, model.get_submodule(path.rpartition(".")[0]))
        mark_experts(model)
        stacks: dict[str, dict[str, Pieces]] = {}
        for name, pieces in names.stacked.items():
            path, _, stack = name.rpartition(".")
            stacks.setdefault(path, {})[stack] = pieces
        for path, own in stacks.items():
            experts = _experts(model.get_submodule(path), own, tensors, layout, path)
            model.set_submodule(path, experts)
            _skip_initialization(*experts.modules(), model.get_submodule(path.rpartition(".")[0]))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        del kwargs
        packed = (path for path, module in model.named_modules() if isinstance(module, StoredLinear | PackedLinear))
        refill(model, (path.rpartition(".")[0] for path in packed))
        for path, module in list(model.named_modules()):
            if isinstance(module, StoredLinear):
                self._repacked = True
                module = module.packed()
                model.set_submodule(path, module)
            if isinstance(module, PackedLinear):
                module.finish()
        return model

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return not self._repacked


class Registration:
    """A replacement of transformers' handlers for some quantization methods; ``undo``, or use it in a ``with``."""

    def __init__(self, methods: tuple[str, ...]) -> None:
        self._previous: list[tuple[dict[str, Any], str, Any]] = []
        replacements: tuple[tuple[dict[str, Any], type], ...] = (
            (AUTO_QUANTIZATION_CONFIG_MAPPING, PackedConfig),
            (AUTO_QUANTIZER_MAPPING, PackedQuantizer),
        )
        for mapping, ours in replacements:
            for method in methods:
                self._previous.append((mapping, method, mapping[method]))
                mapping[method] = ours

    def undo(self) -> None:
        """Put back what was there; a second call does nothing."""
        while self._previous:
            mapping, method, previous = self._previous.pop()
            mapping[method] = previous

    def __enter__(self) -> "Registration":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def register(methods: tuple[str, ...] = ("auto-round",)) -> Registration:
    """Make ``from_pretrained`` load these quantization methods with this package in place of the ones it knows.

    Args:
        methods: values of ``quant_method``, out of "auto-round", "gptq", "awq" and "compressed-tensors".

    Returns:
        What undoes it. Registrations end in the reverse order of their beginnings.

    >>> with register():
    ...     AUTO_QUANTIZER_MAPPING["auto-round"].__name__
    'PackedQuantizer'
    >>> AUTO_QUANTIZER_MAPPING["auto-round"].__name__
    'AutoRoundQuantizer'
    """
    return Registration(methods)


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a quantized or ordinary checkpoint for inference.

    In float32 and float16, and in every forward that records gradients, the weights computed with are the stored
    ones, ``scale * (q - zero)``. In bfloat16 without gradients (``torch.no_grad()``, ``generate``), layers of 3 and 4
    bits multiply up to 64 rows at once with torch's 4-bit kernel; it rounds each scale to bfloat16 where other paths
    round each weight. Load in float32 to compare results exactly. The kernel for CUDA, up to 16 rows, is untested on
    hardware.

    GGUF files are dequantized into dense models.

    Args:
        path: folder or hub name of a checkpoint in any layout of this package; a GGUF file, or a folder that holds one.
        dtype: of activations and unquantized weights; when not given the checkpoint's own, float32 for GGUF.
        device: the CPU when not given.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        ModelError: there is no such checkpoint, or its files are damaged.
        FormatError: its layout is not one this package reads.
    """
    if (file := gguf_file(Path(path))) is not None and file.is_file():
        return _load_gguf(file, dtype or torch.float32, device)
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ModelError(f"{path}: found no config.json; needed a folder written by auto-round or by transformers")
    try:
        with register(METHODS):
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            model: PreTrainedModel = auto_class(config).from_pretrained(
                path, dtype=dtype or "auto", device_map=device, trust_remote_code=trust_remote_code
            )
    except (OSError, SafetensorError) as error:
        cause = str(error).partition("\n")[0]
        raise ModelError(
            f"{path}: {cause}; needed a complete checkpoint folder or a hub name; check the path"
        ) from error
    return model


def _load_gguf(file: Path, dtype: torch.dtype | str, device: torch.device | str | int | None) -> PreTrainedModel:
    read_tensors(file)  # refuses damaged files with a message
    config = read_config(open_gguf(file))
    scaled = rope_of(config).get("rope_type", "default") != "default"
    own = {"config": config} if scaled else {}  # else as transformers reads it
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=dtype,
            device_map=device,
            quantization_config=GgufConfig(dequantize=True),
            **own,
        )
    except (ValueError, OSError, NotImplementedError) as error:
        cause = str(error).partition("\n")[0]
        raise ModelError(
            f"{file}: {cause}; needed an architecture that transformers reads from GGUF; serve it with llama.cpp"
        ) from error
    return model


def _skip_initialization(*modules: nn.Module) -> None:
    """Keep transformers from initializing weights that are no longer there, which some parents do by name."""
    for module in modules:
        vars(module)["_is_hf_initialized"] = True


def _experts(
    module: nn.Module, stacks: dict[str, Pieces], tensors: dict[str, dict[str, Tensor]], layout: Stored, path: str
) -> PackedExperts:
    """What stands in for a module of experts."""
    layers: dict[str, list[dict[str, nn.Module]]] = {}
    for stack, pieces in stacks.items():
        weight = module.get_parameter(stack)
        _, rows, columns = (weight.mT if module.is_transposed else weight).shape
        blank = nn.Linear(columns, rows // len(pieces[0]), bias=False, device="meta")
        layers[stack] = []
        for expert, keys in enumerate(pieces):
            names = [key.removesuffix(".weight") for key in keys]
            layers[stack].append({name.rpartition(".")[2]: _layer(blank, tensors[name], layout, f"{path}.{expert}")
                                  for name in names})  # fmt: skip
    return PackedExperts(module, layers)


def _layer(linear: nn.Module, tensors: dict[str, Tensor], layout: Stored, path: str) -> nn.Module:
    """What stands in for a linear layer while its tensors are loaded, without data."""
    assert isinstance(linear, nn.Linear | Conv1D)
    in_features, out_features = linear.weight.shape if isinstance(linear, Conv1D) else reversed(linear.weight.shape)
    spec = layout.spec(tensors, in_features, path)
    if layout.zero_offset is None:
        if out_features % PERIOD or in_features % PERIOD:
            raise FormatError(
                f"{path}: found {out_features}x{in_features} weights; needed multiples of {PERIOD}, in which packed "
                "layers compute; load it with the library that wrote it"
            )
        return StoredLinear(tensors, layout=layout, spec=spec, bias=linear.bias)
    layer = PackedLinear(tensors, zero_offset=layout.zero_offset, bias=linear.bias)
    if (layer.out_features, layer.in_features) != (out_features, in_features):
        raise FormatError(
            f"{path}: found {layer.out_features}x{layer.in_features} weights of {layer.bits} bits; needed "
            f"{out_features}x{in_features}; config.json and the weights do not belong together"
        )
    return layer
