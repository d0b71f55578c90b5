"""The journal: codes of every finished block on disk, from which a run goes on and every format is packed.

Layout of the folder::

    manifest.json                 what the run is; a different run is refused
    run.yaml                      its settings, for ``auto-round --config``
    lock                          held by the process that works on it
    blocks/00003.safetensors      codes of block 3: ``<layer>.q_OI``, ``<layer>.scale_OG``, …, the fields of its tuple
    scales.safetensors            scales that were tuned after the last block: ``<block>.<layer>.scale_OG``, …
    activations/                  inputs of the block after the last finished one: see ``autoround.slots``

Every other file is written under a temporary name, synced and renamed, and carries a checksum of its contents. The
codes of a block are written after its activations and so mark it as finished.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autoround.errors import JournalError
from autoround.func.types import AsymBlockCodes, Codes, IntCodes, SymBlockCodes
from autoround.sealed import SEAL, partial_name, replacing, reported, seal_of
from autoround.slots import Slots

MANIFEST, BLOCKS, ACTIVATIONS, LOCK = "manifest.json", "blocks", "activations", "lock"
SCALES = "scales.safetensors"
# Part of the manifest that may differ where a run goes on: the same weights may lie elsewhere now.
ORIGIN = "origin"
# Another such part: scales are tuned anew from the codes of the blocks, which know nothing of it.
SCALE_STEPS = "scale_steps"
# Where a safetensors file keeps what is no tensor.
NOTES = "notes"
SHOWN_DIFFERENCES = 4
_KINDS: Mapping[frozenset[str], type[Codes]] = {
    frozenset(kind._fields): kind for kind in (IntCodes, SymBlockCodes, AsymBlockCodes)
}


class Journal:
    """A run's folder of finished work; ``open_journal`` makes or continues one.

    Attributes:
        folder: where it is.
        manifest: what the run is.
        activations: what flows into the block after the last finished one.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], lock: BaseFileLock | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self.activations = Slots(folder / ACTIVATIONS)
        self._tuned: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self._lock = lock  # held as long as the journal is

    def finished(self) -> int:
        """How many blocks, from the first on, are done."""
        count = 0
        while self._block(count).exists():
            count += 1
        return count

    def record(self, **parts: Any) -> None:
        """Change parts of the manifest, where a run that goes on must know what this one had to change.

        Raises:
            JournalError: the disk is full or not writable; the manifest stays as it was.
        """
        self.manifest = {**self.manifest, **parts}
        write_manifest(self.folder, self.manifest)

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
        """Codes of a finished block by layer path relative to the block, with tuned scales where there are any.

        Raises:
            JournalError: the block or its scales are missing, or a file is damaged.
        """
        codes, (tuned, _) = self.read_codes(index), self._read_scales()
        return {
            path: own._replace(
                **{name: tuned[key] for name in own._fields if (key := f"{index}.{path}.{name}") in tuned}
            )
            for path, own in codes.items()
        }

    def write_scales(self, blocks: Mapping[int, Mapping[str, Codes]], steps: int) -> None:
        """Record scales that were tuned after the last block, in place of earlier ones.

        Args:
            blocks: number of a block -> layer path relative to the block -> its codes, of which the scales are kept.
            steps: with how many they were tuned.

        Raises:
            JournalError: the disk is full or not writable; nothing half-written is left.
        """
        tensors = {
            f"{index}.{path}.{name}": tensor.cpu().contiguous()
            for index, codes in blocks.items()
            for path, own in codes.items()
            for name, tensor in own._asdict().items()
            if tensor.is_floating_point()
        }
        self._tuned = None
        _save(self._scales, tensors, {SCALE_STEPS: steps})

    def scale_steps(self) -> int:
        """With how many steps scales were tuned after the last block; 0 where they were not.

        Raises:
            JournalError: their file is damaged.
        """
        _, notes = self._read_scales()
        return int(notes.get(SCALE_STEPS, 0))

    def drop_scales(self) -> None:
        """Forget tuned scales: those that codes were chosen with hold again."""
        self._tuned = None
        self._scales.unlink(missing_ok=True)

    def read_codes(self, index: int) -> dict[str, Codes]:
        """Codes of a finished block as its own steps left them.

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

    def _read_scales(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tuned scales and the notes beside them, empty where there are none; their file is read once."""
        if self._tuned is None and self._scales.exists():
            self._tuned = _load(self._scales, "delete it, and the scales are tuned again")
        return self._tuned or ({}, {})

    @property
    def _scales(self) -> Path:
        return self.folder / SCALES

    def _block(self, index: int) -> Path:
        return self.folder / BLOCKS / f"{index:05d}.safetensors"


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
    with reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not there and {file.name for file in folder.iterdir()} - {partial_name(folder / MANIFEST).name, LOCK}:
            raise JournalError(
                f"{folder}: found files that are not a journal; use another --output_dir or move them away"
            )
    lock = _locked(folder)
    with reported(folder):
        (folder / SCALES).unlink(missing_ok=True)
        for name in (BLOCKS, ACTIVATIONS):
            if (folder / name).exists():
                shutil.rmtree(folder / name)
    write_manifest(folder, manifest)
    return Journal(folder, manifest, lock)


def _check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse the journal of another run by what differs."""
    free = dict.fromkeys((ORIGIN, SCALE_STEPS))
    differences = list(_differences({**before, **free}, {**now, **free}))
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
    sealed = {**manifest, SEAL: seal_of(manifest)}
    with replacing(folder / MANIFEST) as temporary:
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
    if seal != seal_of(manifest):
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
    with reported(path):
        path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        # one entry, since the library writes several in any order
        save_file(tensors, temporary, {NOTES: json.dumps({**notes, SEAL: seal_of(notes, tensors)})})


def _load(path: Path, remedy: str = "start anew with --restart") -> tuple[dict[str, Tensor], dict[str, Any]]:
    needed = f"needed a file of this journal; {remedy}"
    try:
        with safe_open(path, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  not a dict
            notes: dict[str, Any] = json.loads((handle.metadata() or {}).get(NOTES, "{}"))
            sealed = notes.pop(SEAL, None) == seal_of(notes, tensors)
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise JournalError(f"{path}: {error}; {needed}") from error
    if not sealed:
        raise JournalError(f"{path}: found contents that do not match their checksum; {needed}")
    return tensors, notes
