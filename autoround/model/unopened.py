"""A model of which nothing is read but its processor, and that only where there are images."""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from autoround.errors import DataError, ModelError
from autoround.model.hub import download
from autoround.model.load import folder_config
from autoround.model.processor import BLIND, open_processor
from autoround.model.skeleton import sees_images


class Unopened:
    """Stands for a model where calibration data is read and nothing is written or tuned.

    Args:
        model: a folder, a ``.gguf`` file or a hub name.
        tokenizer: its own; the vocabulary is what is allowed.
        revision: branch, tag or commit of a hub name.
        cache_dir: where hub downloads are kept.
        token: for private hub models.
        trust_remote_code: run Python code that comes with the processor.
    """

    def __init__(
        self, model: str, tokenizer: PreTrainedTokenizerBase, *, revision: str | None = None,
        cache_dir: str | None = None, token: str | None = None, trust_remote_code: bool = False,
    ) -> None:  # fmt: skip
        self._model, self._tokenizer = model, tokenizer
        self._revision, self._cache_dir, self._token = revision, cache_dir, token
        self._trust_remote_code = trust_remote_code

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer has."""
        return 1 + max(self._tokenizer.get_vocab().values(), default=-1)

    def processor(self) -> ProcessorMixin:
        """Load the processor of images and text; of a hub model, without its weights.

        Raises:
            ModelError: the model sees no images, or there is no processor that loads.
        """
        path = Path(self._model).expanduser()
        if path.suffix == ".gguf":
            raise ModelError(f"{self._model}: {BLIND}")
        folder = path if path.exists() else download(
            self._model, revision=self._revision, cache_dir=self._cache_dir, token=self._token, weights=False
        )  # fmt: skip
        config = folder_config(folder, trust_remote_code=self._trust_remote_code)
        if not sees_images(config):
            raise ModelError(f"{self._model}: {BLIND}")
        return open_processor(folder, config, trust_remote_code=self._trust_remote_code)

    def sample(
        self, rows: int, tokens: int, *, prefix: Sequence[int], firsts: Sequence[int], ends: Sequence[int], seed: str
    ) -> NoReturn:
        """Raises DataError: a model that is not opened writes nothing."""
        raise DataError("dataset 'self': found a model that is not opened; needed one that writes; give a file")
