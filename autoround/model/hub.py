"""Models on the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from autoround.errors import ModelError

# What a model folder holds beside its weights: configuration, tokenizer, chat templates, custom code.
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py")


def download(
    name: str, *, revision: str | None, cache_dir: str | Path | None, token: str | bool | None, weights: bool = True
) -> Path:
    """Bring a model into the local cache and return its folder; without a connection the cache is used as it is.

    Args:
        name: such as ``Qwen/Qwen3-0.6B``.
        revision: branch, tag or commit.
        cache_dir: the hub's own default when None.
        token: for private and gated models; that of ``hf auth login`` when None.
        weights: bring the weights too, not only what is beside them.

    Raises:
        ModelError: not a model's name, no such model or revision, no access, no safetensors, or neither a connection
            nor a cached copy.
    """
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            allow_patterns=[*SIDE_FILES, "*.safetensors"] if weights else list(SIDE_FILES),
            ignore_patterns=["*/*.safetensors", "consolidated*"],
        )
    except HFValidationError as error:
        raise ModelError(
            f"{name}: found no such folder or file; needed one, or a hub name such as Qwen/Qwen3-0.6B; check the path"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name}: found no revision {revision}; needed a branch, tag or commit of it") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{name}: found no such folder, and no such model on the hub or no access to it; needed a folder, a .gguf "
            "file or a hub name; check the spelling, and run `hf auth login` for a private or gated model"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        raise ModelError(
            f"{name}: found no such folder, no copy in the hub cache and no connection to the hub; "
            "needed one of them; check the spelling or the network, or give a local folder"
        ) from error
    if weights and not any(Path(folder).glob("*.safetensors")):
        raise ModelError(
            f"{name}: found no safetensors; needed model.safetensors or model.safetensors.index.json; convert the "
            "model with save_pretrained, or name a .gguf file"
        )
    return Path(folder)
