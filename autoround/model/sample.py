"""Token rows that a model writes itself: calibration data where no text suits.

The whole model is held in memory for it, which is checked before anything is read, and caches of its size or, if that
is more, of a gigabyte. A document begins with a token drawn at random, goes on with the likeliest tokens and then with
tokens drawn from the model's own distribution (temperature 1), as LLM-QAT found useful (arXiv 2305.17888). A row in
which a document ends goes on with another one.

Legend: B rows at once, T tokens so far, V vocabulary.
"""

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    ProcessorMixin,
)

from autoround.errors import DataError, ModelError
from autoround.model.load import OpenModel

# Likeliest tokens after the first one of a document; LLM-QAT takes three to five.
GREEDY = 4
# Rows written together: as many as have caches of this size, or of the weights' where that is more.
MOST_ROWS, CACHE_BYTES = 64, 2**30
REPORTS = 20


class Sampler:
    """Writes rows of tokens with an opened model.

    Args:
        model: is not changed; its weights are read when the first rows are asked for, and freed after each call.
        device: where it runs.
        dtype: floating-point dtype in which it runs.
        on_progress: called with (tokens written, tokens in all) about twenty times.
    """

    def __init__(
        self,
        model: OpenModel,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._model, self._device, self._dtype = model, torch.device(device), dtype
        self._on_progress = on_progress

    @property
    def vocab_size(self) -> int:
        """Ids that the model takes."""
        size: int = self._model.skeleton.get_input_embeddings().get_parameter("weight").shape[0]
        return size

    def processor(self) -> ProcessorMixin:
        """The model's own processor of images and text; see ``OpenModel.processor``."""
        return self._model.processor()

    def sample(
        self, rows: int, tokens: int, *, prefix: Sequence[int], firsts: Sequence[int], ends: Sequence[int], seed: str
    ) -> list[list[int]]:
        """Write rows, each of which draws from a generator of its own: the first ones do not change with their number.

        Args:
            rows: how many, at least 1.
            tokens: in each row, the prefix included, at least 1.
            prefix: ids before every row, BOS as a rule.
            firsts: ids one of which, drawn evenly, begins a document; empty leaves the first token of a document to
                the model, which needs a prefix then.
            ends: ids that end a document, beside those of the model's own configuration.
            seed: same seed, same rows on the same machine.

        Raises:
            DataError: too little free memory for the model; says how much is needed.
            ModelError: a missing weight, or predictions that are not finite.
        """
        if not prefix and not firsts:
            raise DataError("self: found neither a prefix nor first tokens; needed one of them to begin a row with")
        if min([*prefix, *firsts]) < 0 or max([*prefix, *firsts]) >= self.vocab_size:
            raise DataError(f"self: found ids beyond the model's {self.vocab_size}; needed the model's own tokenizer")
        network = _loaded(self._model, self._device, self._dtype)
        all_ends = {*ends, *_own_ends(self._model)}
        at_once = _rows_at_once(network, tokens)
        written: list[list[int]] = []
        for start in range(0, rows, at_once):
            numbers = range(start, min(start + at_once, rows))
            choose = _Choose([random.Random(f"{seed}:{number}") for number in numbers], firsts=firsts, ends=all_ends)
            if self._on_progress is not None:
                choose.on_token = _counted(self._on_progress, start * tokens, len(numbers), rows * tokens)
            written += _write(network, choose, prefix=prefix, tokens=tokens)
        return written


def _counted(told: Callable[[int, int], None], done: int, rows: int, total: int) -> Callable[[int], None]:
    """Tells of every twentieth part of all tokens, given the length of the rows in work."""

    def on_token(tokens: int) -> None:
        now, before = done + rows * tokens, done + rows * (tokens - 1)
        if now * REPORTS // total > before * REPORTS // total:
            told(now, total)

    return on_token


def _own_ends(model: OpenModel) -> tuple[int, ...]:
    found: int | list[int] | None = model.config.get_text_config().eos_token_id
    return () if found is None else (found,) if isinstance(found, int) else tuple(found)


def _write(network: PreTrainedModel, choose: "_Choose", *, prefix: Sequence[int], tokens: int) -> list[list[int]]:
    """One batch of rows, token by token, through the library's own loop: it knows every model's cache and masks."""
    opening = [[*prefix, *first] for first in choose.openings()]
    left = tokens - len(opening[0])
    if left <= 0:
        return [row[:tokens] for row in opening]
    tokens_BT = torch.tensor(opening, device=network.device)
    generate: Any = network.generate
    with torch.inference_mode():
        out_BT = generate(
            tokens_BT,
            attention_mask=torch.ones_like(tokens_BT),
            generation_config=_settings(left),
            logits_processor=LogitsProcessorList([choose]),
        )
    rows: list[list[int]] = out_BT.tolist()
    return rows


def _settings(tokens: int) -> GenerationConfig:
    """So many tokens, whatever they are; no setting that comes with the model counts."""
    return GenerationConfig(do_sample=False, max_new_tokens=tokens, pad_token_id=0)  # type: ignore[no-untyped-call]


class _Choose(LogitsProcessor):
    """Decides every row's next token and leaves the loop no other choice."""

    def __init__(self, generators: Sequence[random.Random], *, firsts: Sequence[int], ends: Iterable[int]) -> None:
        self._generators, self._firsts, self._ends = generators, firsts, frozenset(ends)
        self._ages = [0] * len(generators)
        self.on_token: Callable[[int], None] | None = None

    def openings(self) -> list[list[int]]:
        """The first token of every row, or nothing where the model draws it."""
        if not self._firsts:
            return [[] for _ in self._generators]
        self._ages = [1] * len(self._generators)
        return [[self._first(generator.random())] for generator in self._generators]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Logits that allow the chosen token alone."""
        probability_BV = scores.cpu().float().softmax(-1).double()
        drawn = [generator.random() for generator in self._generators]
        sampled_B = _draw(probability_BV, torch.tensor(drawn, dtype=torch.float64))
        pairs = zip(probability_BV.argmax(-1).tolist(), sampled_B.tolist(), strict=True)
        chosen = [self._next(row, drawn[row], likeliest, sampled) for row, (likeliest, sampled) in enumerate(pairs)]
        if self.on_token is not None:
            self.on_token(input_ids.shape[1] + 1)
        only_BV = torch.full_like(scores, -torch.inf)
        only_BV.scatter_(1, torch.tensor(chosen, device=scores.device)[:, None], 0.0)
        return only_BV  # type: ignore[return-value]

    def _next(self, row: int, drawn: float, likeliest: int, sampled: int) -> int:
        age = self._ages[row]
        if age == 0:
            token = self._first(drawn) if self._firsts else sampled
        else:
            token = likeliest if age <= GREEDY and likeliest not in self._ends else sampled
        self._ages[row] = 0 if token in self._ends else age + 1
        return token

    def _first(self, drawn: float) -> int:
        return self._firsts[int(drawn * len(self._firsts))]


def _draw(probability_BV: Tensor, drawn_B: Tensor) -> Tensor:
    """The ids at which the cumulated probabilities pass the numbers drawn from [0, 1)."""
    cumulated_BV = probability_BV.cumsum(-1)
    total_B1 = cumulated_BV[:, -1:]
    if not bool(torch.isfinite(total_B1).all()):
        raise ModelError("self: found predictions that are not finite; needed a model that works; check its weights")
    return torch.searchsorted(cumulated_BV, drawn_B[:, None] * total_B1, right=True)[:, 0]


def _loaded(model: OpenModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights, those of a model in memory shared where dtype and device are the same."""
    skeleton, source = model.skeleton, model.source
    names = {id(tensor): name for name, tensor in _tensors(skeleton)}
    size = sum(tensor.numel() for tensor in skeleton.parameters()) * dtype.itemsize
    if model.folder is not None or device.type != "cpu":
        _check_memory(size, device)
    memo: dict[int, object] = {}
    stored = frozenset(source.names())
    for tensor in (*skeleton.parameters(), *skeleton.buffers()):
        name = names[id(tensor)]
        data = source.read(name) if tensor.is_meta or name in stored else tensor
        data = data.to(device, dtype if isinstance(tensor, nn.Parameter) and data.is_floating_point() else data.dtype)
        memo[id(tensor)] = nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data
    network: PreTrainedModel = copy.deepcopy(skeleton, memo)
    network.generation_config = _settings(1)
    return network


def _tensors(skeleton: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    yield from skeleton.named_parameters()
    yield from skeleton.named_buffers()


def _check_memory(size: int, device: torch.device) -> None:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if size > free:
        raise DataError(
            f"dataset 'self': found {free / 1e9:.1f} GB of free memory; needed {size / 1e9:.1f} GB, since the whole "
            "model writes the text; give --dataset python-docs or a file"
        )


def _rows_at_once(network: PreTrainedModel, tokens: int) -> int:
    """How many rows are written together; a function of the model alone, since it touches the last bits of numbers."""
    cache = DynamicCache(config=network.config)
    with torch.inference_mode():
        network(torch.zeros(1, 1, dtype=torch.int64, device=network.device), past_key_values=cache, use_cache=True)
    held = [state for keys, values, *_ in cache for state in (keys, values) if state is not None]
    a_row: int = tokens * sum(state.nbytes for state in held)
    weights: int = sum(parameter.nbytes for parameter in network.parameters())
    return max(1, min(MOST_ROWS, max(weights, CACHE_BYTES) // max(a_row, 1)))
