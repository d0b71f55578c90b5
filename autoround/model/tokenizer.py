"""The tokenizer of a model whose weights are not needed."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from autoround.errors import ModelError


def open_tokenizer(
    model: str,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; of a hub model only the files of the tokenizer are downloaded.

    Args:
        model: a folder, a ``.gguf`` file or a hub name.
        revision: branch, tag or commit of a hub name.
        cache_dir: where hub downloads are kept.
        token: for private and gated hub models.
        trust_remote_code: run Python code that comes with the tokenizer.

    Raises:
        ModelError: there is none, or it cannot be loaded.
    """
    path = Path(model).expanduser()
    is_file = path.suffix == ".gguf"
    if is_file and not path.is_file():
        raise ModelError(f"{model}: found no such file; needed a GGUF file; check the path")
    where = path.parent if is_file else path if path.exists() else model
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            where,
            gguf_file=path.name if is_file else None,
            revision=revision or "main",
            cache_dir=cache_dir,
            token=token,
            trust_remote_code=trust_remote_code,
        )
    except (ValueError, OSError, KeyError, ImportError) as error:
        line = " ".join(str(error).split())
        raise ModelError(
            f"{model}: found no tokenizer that loads ({line}); needed a model's folder, .gguf file or hub name"
        ) from error
    return tokenizer
