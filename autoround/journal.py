"""The journal: codes of every finished block on disk, from which a run goes on and every format is packed.

Layout of the folder::

    manifest.json                 what the run is; a different run is refused
    run.yaml                      its settings, for ``auto-round --config``
    lock                          held by the process that works on it
    blocks/00003.safetensors      codes of block 3: ``<layer>.q_OI``, ``<layer>.scale_OG``, …, the fields of its tuple
    activations/0.safetensors     inputs of the block after an even one, and
    activations/1.safetensors     after an odd one, so that the last finished block's are always whole

Every file is written under a temporary name, synced and renamed, and carries a checksum of its contents. A block's
codes are written after its activations and so mark the block as finished.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autoround.errors import JournalError
from autoround.func.types import AsymBlockCodes, Codes, IntCodes, SymBlockCodes

MANIFEST, BLOCKS, ACTIVATIONS, LOCK = "manifest.json", "blocks", "activations", "lock"
# Part of the manifest that may differ where a run goes on: the same weights may lie elsewhere now.
ORIGIN = "origin"
# Where a file keeps the checksum of the rest of it, and a safetensors file what is no tensor.
SEAL, NOTES = "sha256", "notes"
SHOWN_DIFFERENCES = 4
_KINDS: Mapping[frozenset[str], type[Codes]] = {
    frozenset(kind._fields): kind for kind in (IntCodes, SymBlockCodes, AsymBlockCodes)
}


class Journal:
    """A run's folder of finished work; ``open_journal`` makes or continues one."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], lock: BaseFileLock | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self._lock = lock  # held as long as the journal is

    def finished(self) -> int:
        """How many blocks, from the first on, are done."""
        count = 0
        while self._block(count).exists():
            count += 1
        return count

    def write_block(self, index: int, codes: Mapping[str, Codes], stats: Mapping[str, float]) -> None:
        """Record a finished block.

        Args:
            index: its place in call order.
            codes: layer path relative to the block -> codes.
            stats: numbers to keep with it.

        Raises:
            JournalError: the disk is full or not writable; nothing half-written is left.
        """
        tensors = {f"{path}.{name}": tensor.cpu().contiguous()
                   for path, own in codes.items() for name, tensor in own._asdict().items()}  # fmt: skip
        _save(self._block(index), tensors, {"stats": dict(stats)})

    def read_block(self, index: int) -> dict[str, Codes]:
        """Codes of a finished block by layer path relative to the block.

        Raises:
            JournalError: the block is missing or its file is damaged.
        """
        tensors, _ = _load(self._block(index))
        layers: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            path, _, field = name.rpartition(".")
            layers.setdefault(path, {})[field] = tensor
        for path, fields in layers.items():
            if frozenset(fields) not in _KINDS:
                raise JournalError(
                    f"{self._block(index)}: {path}: found {', '.join(sorted(fields))}; needed the fields of one kind "
                    "of codes; start anew with --restart"
                )
        return {path: _KINDS[frozenset(fields)](**fields) for path, fields in layers.items()}

    def read_stats(self, index: int) -> dict[str, float]:
        """Numbers kept with a finished block.

        Raises:
            JournalError: as ``read_block``; all of the file is checked.
        """
        _, notes = _load(self._block(index))
        stats: dict[str, float] = notes["stats"]
        return stats

    def write_activations(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the inputs of the block after ``index``, replacing those of the block before it."""
        _save(
            self._slot(index),
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            {"block": index},
        )

    def read_activations(self, index: int) -> dict[str, Tensor]:
        """The inputs of the block after ``index``.

        Raises:
            JournalError: they are missing, of another block, or damaged.
        """
        tensors, notes = _load(self._slot(index))
        if notes.get("block") != index:
            raise JournalError(
                f"{self._slot(index)}: found activations of block {notes.get('block')}; needed {index}; "
                "start anew with --restart"
            )
        return tensors

    def drop_activations(self) -> None:
        """Forget activations: after the last block nothing needs them."""
        shutil.rmtree(self.folder / ACTIVATIONS, ignore_errors=True)

    def _block(self, index: int) -> Path:
        return self.folder / BLOCKS / f"{index:05d}.safetensors"

    def _slot(self, index: int) -> Path:
        return self.folder / ACTIVATIONS / f"{index % 2}.safetensors"


def open_journal(folder: Path, manifest: Mapping[str, Any], *, restart: bool = False) -> Journal:
    """Begin a journal, or continue the one in the folder if it is of the same run.

    Args:
        folder: made if missing.
        manifest: JSON-serializable description of everything that decides the codes.
        restart: discard a journal that is there.

    Raises:
        JournalError: the folder holds another run's journal (the message says what differs) or none of ours, is not
            writable, or another process works on it.
    """
    manifest = json.loads(json.dumps(manifest))
    there = (folder / MANIFEST).exists()
    if there and not restart:
        _check_same(folder, read_manifest(folder), manifest)
        return Journal(folder, manifest, _locked(folder))
    with _reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not there and {file.name for file in folder.iterdir()} - {_partial(folder / MANIFEST).name, LOCK}:
            raise JournalError(
                f"{folder}: found files that are not a journal; use another --output_dir or move them away"
            )
    lock = _locked(folder)
    with _reported(folder):
        for name in (BLOCKS, ACTIVATIONS):
            if (folder / name).exists():
                shutil.rmtree(folder / name)
    write_manifest(folder, manifest)
    return Journal(folder, manifest, lock)


def _check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse the journal of another run by what differs."""
    differences = list(_differences({**before, ORIGIN: None}, {**now, ORIGIN: None}))
    if differences:
        shown = sorted(differences, key=lambda text: text.startswith("plan."))[:SHOWN_DIFFERENCES]
        more = f" and {len(differences) - len(shown)} more" if len(differences) > len(shown) else ""
        raise JournalError(
            f"{folder}: found the journal of another run ({'; '.join(shown)}{more}); "
            "use another --output_dir, or --restart to discard it and begin anew"
        )


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a journal, with a checksum.

    Raises:
        JournalError: the disk is full or not writable; a manifest that was there stays whole.
    """
    sealed = {**manifest, SEAL: _seal(manifest)}
    with _replacing(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(sealed, indent=1, sort_keys=True))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a journal.

    Raises:
        JournalError: there is none, it is not JSON, or not what was written.
    """
    needed = "needed a journal's manifest as this version wrote it; start anew with --restart"
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        seal = manifest.pop(SEAL, None)
    except (OSError, ValueError, AttributeError) as error:
        raise JournalError(f"{folder / MANIFEST}: {error}; {needed}") from error
    if seal != _seal(manifest):
        raise JournalError(f"{folder / MANIFEST}: found contents that do not match their checksum; {needed}")
    return manifest


def hold(folder: Path) -> BaseFileLock | None:
    """The lock of a journal that some run has begun before; None where none has.

    Raises:
        JournalError: another process works on it.
    """
    return _locked(folder) if (folder / LOCK).exists() else None


def _locked(folder: Path) -> BaseFileLock:
    """The lock of a journal, which one process at a time can have; the system takes it back when that ends."""
    lock: BaseFileLock = FileLock(folder / LOCK, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise JournalError(
            f"{folder}: found another run at work on it; wait until that ends, or use another --output_dir"
        ) from None
    except OSError as error:
        raise JournalError(f"{folder / LOCK}: {error}; needed a writable folder with space") from error
    return lock


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted(set(old) | set(new)):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            yield f"{prefix}{key}: was {before!r}, now {now!r}"


def _save(path: Path, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
    with _reported(path):
        path.parent.mkdir(exist_ok=True)
    with _replacing(path) as temporary:
        # one entry, since the library writes several in any order
        save_file(tensors, temporary, {NOTES: json.dumps({**notes, SEAL: _seal(notes, tensors)})})


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    needed = "needed a file of this journal; start anew with --restart"
    try:
        with safe_open(path, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  not a dict
            notes: dict[str, Any] = json.loads((handle.metadata() or {}).get(NOTES, "{}"))
            sealed = notes.pop(SEAL, None) == _seal(notes, tensors)
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise JournalError(f"{path}: {error}; {needed}") from error
    if not sealed:
        raise JournalError(f"{path}: found contents that do not match their checksum; {needed}")
    return tensors, notes


def _seal(notes: Mapping[str, Any], tensors: Mapping[str, Tensor] = MappingProxyType({})) -> str:
    """A checksum of what a file holds."""
    text = json.dumps(dict(notes), sort_keys=True) + digest((name, tensors[name]) for name in sorted(tensors))
    return hashlib.sha256(text.encode()).hexdigest()


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name that becomes ``path``, synced, when the block ends well, and vanishes when it does not."""
    temporary = _partial(path)
    with _reported(path):
        try:
            yield temporary
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Failures to write, with what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise JournalError(
            f"{path}: {error}; needed a writable folder with space; run again when there is: finished blocks are kept"
        ) from error


def digest(tensors: Iterator[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, one at a time."""
    total = hashlib.sha256()
    for name, tensor in tensors:
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        total.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return total.hexdigest()
