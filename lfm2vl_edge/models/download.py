"""Download models and checkpoints from the hub, enter them into the manifest, and remove them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final

from lfm2vl_edge.errors import DownloadError, ModelNotPulled, clip, shorten
from lfm2vl_edge.host import data_folder, is_arm
from lfm2vl_edge.models import hub
from lfm2vl_edge.models.facts import read_facts
from lfm2vl_edge.models.hub import RemoteFile, Repository
from lfm2vl_edge.models.manifest import (
    ManifestEntry,
    ManifestFile,
    find_checkpoint,
    find_entry,
    read_manifest,
    write_manifest,
)
from lfm2vl_edge.models.names import LANGUAGE_ARCHITECTURE, Pair
from lfm2vl_edge.models.registry import Reference, display_name, quant_in_name, reference_of

Progress = Callable[[int, int], None]
"""Called after each block with the bytes that are on this machine and the bytes in total."""
_PREFERRED_TYPES: Final = ("Q4_0", "Q4_K_M", "Q8_0", "F16", "BF16", "F32")
"""Those of `config.LANGUAGE_TYPES` that are chosen if no type is given, the first of them that a repository has."""
_PREFERRED_MMPROJ_TYPES: Final = ("F16", "BF16", "Q8_0", "F32")
"""The same of `config.ENCODER_TYPES`: the fastest that is exact on every processor first, F32 last for its size."""
_PREFERRED_MMPROJ_TYPES_ARM: Final = ("F16", "Q8_0", "F32", "BF16")
"""The same on ARM, where BF16 takes 16 times the instructions of F32 (docs/raspberry-pi.md)."""
_UNTYPED: Final = "GGUF"
"""Stands for the type of a file whose name has none."""
_MAX_LISTED: Final = 40
"""Types in a message."""
_LONGEST_TYPE: Final = 24
"""Characters of a type in a message."""
_UNKNOWN_LICENCE: Final = "not stated; see the model card"
_CHECKPOINT_FILES: Final = frozenset(
    {
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "README.md",
        "model.safetensors.index.json",
        "adapter_config.json",
    }
)
"""The files of a checkpoint that the converter reads, besides *.safetensors."""
CHAT_TEMPLATES: Final = "additional_chat_templates/*.jinja"
"""The chat templates of a checkpoint that have names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """A download that is about to start.

    Attributes:
        name: the model's name.
        repo: hub id, `owner/repo`.
        commit: the commit of the files, 40 hex digits.
        files: of a pair the language file and the mmproj; of a checkpoint all files.
        licence: licence of the weights, in a phrase.
        missing_bytes: bytes that are not on this machine yet.
    """

    name: str
    repo: str
    commit: str
    files: tuple[RemoteFile, ...]
    licence: str
    missing_bytes: int

    @property
    def n_bytes(self) -> int:
        """Size of all files, bytes."""
        return sum(file.n_bytes for file in self.files)


OnStart = Callable[[Download], None]
"""Called once before a download starts; an exception from it aborts the download."""


def pull(
    name: str,
    *,
    mmproj_quant: str | None = None,
    revision: str | None = None,
    on_start: OnStart | None = None,
    progress: Progress | None = None,
) -> Pair:
    """Download a model and its mmproj, verify both, and return their paths, which `Model.open` accepts like the name.

    It does what the command `pull` does: an interrupted download is continued, and a model that is on this machine is
    only verified, without asking the hub. Warnings (a retry) go to the log `lfm2vl_edge.models.hub`.

    Args:
        name: such as `lfm2.5-vl-450m`, `lfm2.5-vl-450m:Q8_0`, or `owner/repo[:TYPE]` of a hub with a GGUF pair.
        mmproj_quant: type of the mmproj file; by default the downloaded one, or F16 if there is one.
        revision: a branch, tag or commit; by default the downloaded or published one, else the main branch.
        on_start: called once before a download starts, with its files, sizes and licence; an exception aborts it.
        progress: called with the bytes that are on this machine and the bytes in total.

    Raises:
        ModelNotFound: the name is not valid.
        DownloadError: the hub has no such pair or cannot be reached, the disk is full, or a file arrived damaged.
        ConfigError: the two files are not a pair of an LFM2-VL model.
    """
    entry = download_pair(name, mmproj_quant=mmproj_quant, revision=revision, on_start=on_start, progress=progress)
    return Pair(model=entry.files[0].path, mmproj=entry.files[1].path)


def download_pair(
    name: str,
    *,
    mmproj_quant: str | None = None,
    revision: str | None = None,
    on_start: OnStart | None = None,
    progress: Progress | None = None,
) -> ManifestEntry:
    """Do the work of `pull`, with the same arguments and errors, and return the manifest's entry."""
    reference = reference_of(name)
    usual = reference.known.quant if reference.known else None
    entry = find_entry(read_manifest(), reference.repo, reference.quant, usual)
    if entry is None or not _fits(entry, mmproj_quant, revision) or not _is_intact(entry, progress):
        pinned = revision or (entry.revision if entry else None)
        if entry and reference.quant is None:
            reference = replace(reference, quant=entry.quant)
        entry = _download_pair(reference, mmproj_quant, pinned, on_start, progress)
    _add_entry(entry)
    return entry


def _fits(entry: ManifestEntry, mmproj_quant: str | None, revision: str | None) -> bool:
    same_mmproj = mmproj_quant is None or quant_in_name(entry.files[1].path.name) == mmproj_quant.upper()
    return same_mmproj and revision in (None, entry.revision)


def _is_intact(entry: ManifestEntry, progress: Progress | None) -> bool:
    """Return whether all files are as they were when they were downloaded."""
    done = 0
    for file in entry.files:
        try:
            if not file.exists or not hub.has_digest(file.path, file.digest):
                return False
        except OSError:
            return False
        done += file.n_bytes
        if progress is not None:
            progress(done, entry.n_bytes)
    return True


def _download_pair(
    reference: Reference,
    mmproj_quant: str | None,
    pinned: str | None,
    on_start: OnStart | None,
    progress: Progress | None,
) -> ManifestEntry:
    known = reference.known
    repository = hub.read_repository(reference.repo, pinned or (known.revision if known else None))
    pair = _choose(repository, reference, mmproj_quant)
    if known and pinned in (None, known.revision):
        _check_published(reference, pair)
    licence = known.licence if known else repository.licence
    files = _download(reference.name, repository, pair, licence, on_start, progress)
    read_facts(Pair(model=files[0].path, mmproj=files[1].path))
    return ManifestEntry(repo=reference.repo, quant=_type_of(pair[0]), revision=repository.commit, files=files)


def _choose(repository: Repository, reference: Reference, mmproj_quant: str | None) -> tuple[RemoteFile, RemoteFile]:
    """Return the language file and the mmproj."""
    ggufs = [file for file in repository.files if file.path.lower().endswith(".gguf")]
    models = [file for file in ggufs if "mmproj" not in PurePosixPath(file.path).name.lower()]
    mmprojs = [file for file in ggufs if file not in models]
    if not models:
        raise DownloadError(f"{repository.repo} has no GGUF model{_remedy(repository)}")
    if not mmprojs:
        raise DownloadError(f"{repository.repo} has no mmproj file, so its model cannot see images; pull another one")
    if repository.architecture not in (None, LANGUAGE_ARCHITECTURE):
        raise DownloadError(
            f"{repository.repo} has a {shorten(repository.architecture)} model, not LFM2-VL; pull another one"
        )
    known = reference.known
    usual, usual_mmproj = ((known.quant,), (known.mmprojs[0].quant,)) if known else ((), ())
    preferred = _PREFERRED_MMPROJ_TYPES_ARM if is_arm() else _PREFERRED_MMPROJ_TYPES
    return (
        _of_type(repository.repo, models, reference.quant, usual + _PREFERRED_TYPES),
        _of_type(repository.repo, mmprojs, mmproj_quant, usual_mmproj + preferred),
    )


def _remedy(repository: Repository) -> str:
    if any(file.path == "config.json" for file in repository.files):
        return f" but a checkpoint; to convert it to a pair: lfm2vl-edge convert {repository.repo}"
    return "; give a repository with a language file and its mmproj"


def _type_of(file: RemoteFile) -> str:
    return quant_in_name(file.path) or _UNTYPED


def _of_type(repo: str, files: Sequence[RemoteFile], quant: str | None, preferred: Sequence[str]) -> RemoteFile:
    """Return the file of a type; without one, of the first preferred type that exists, else the smallest file."""
    by_type = {_type_of(file): file for file in reversed(files)}
    if quant is not None and quant.upper() not in by_type:
        types = ", ".join([one for one in sorted(by_type) if len(one) <= _LONGEST_TYPE][:_MAX_LISTED])
        raise DownloadError(f"{repo} has no file of type {clip(quant)}; there are: {types}")
    wanted = [quant.upper()] if quant is not None else preferred
    return next((by_type[one] for one in wanted if one in by_type), min(files, key=lambda file: file.n_bytes))


def _check_published(reference: Reference, files: Iterable[RemoteFile]) -> None:
    """Compare the hub's hashes with those of the registry."""
    for file in files:
        known = reference.known.file(file.path) if reference.known else None
        if known is not None and known.sha256 not in (None, file.digest):
            raise DownloadError(
                f"{file.path} of {reference.repo} is not the file that this program knows: it was replaced on "
                f"the hub; update this program, or accept the new one: lfm2vl-edge pull {reference.name} "
                "--revision main"
            )


def _download(
    name: str,
    repository: Repository,
    files: tuple[RemoteFile, ...],
    licence: str | None,
    on_start: OnStart | None,
    progress: Progress | None,
) -> tuple[ManifestFile, ...]:
    download = Download(
        name=name,
        repo=repository.repo,
        commit=repository.commit,
        files=files,
        licence=licence or _UNKNOWN_LICENCE,
        missing_bytes=sum(hub.missing_bytes(repository.repo, file) for file in files),
    )
    if on_start is not None:
        on_start(download)
    _check_space(download.missing_bytes)
    done, stored = 0, []
    for file in files:

        def on_bytes(n_bytes: int, before: int = done) -> None:
            if progress is not None:
                progress(before + n_bytes, download.n_bytes)

        path = hub.download_file(repository, file, on_bytes)
        stored.append(ManifestFile(path=path, n_bytes=file.n_bytes, digest=file.digest))
        done += file.n_bytes
    return tuple(stored)


def _check_space(needed: int) -> None:
    """Raise a DownloadError if fewer bytes are free on the disk of the hub cache than needed."""
    folder = hub.hub_cache()
    existing = next(one for one in (folder, *folder.parents) if one.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DownloadError(
            f"{needed / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free on the disk of {existing}; "
            "make room, or set HF_HOME to a folder on another disk"
        )


def download_checkpoint(
    repo: str, *, revision: str | None = None, on_start: OnStart | None = None, progress: Progress | None = None
) -> list[Path]:
    """Return the files of a checkpoint that the converter needs, after downloading the missing ones.

    If all are on this machine the hub is not asked, unless another revision is given.

    Args:
        repo: hub id, `owner/repo`.
        revision: see `pull`, as for `on_start` and `progress`.
        on_start: called before a download starts.
        progress: called after each block.

    Raises:
        DownloadError: the repository has no checkpoint, or as for `pull`.
    """
    entry = find_checkpoint(read_manifest(), repo)
    if entry is None or not _is_intact(entry, None) or revision not in (None, entry.revision):
        repository = hub.read_repository(repo, revision)
        files = _download(repo, repository, _checkpoint_files(repository), repository.licence, on_start, progress)
        entry = ManifestEntry(repo=repo, quant=None, revision=repository.commit, files=files)
        _add_entry(entry)
    return [file.path for file in entry.files]


def _checkpoint_files(repository: Repository) -> tuple[RemoteFile, ...]:
    """Return the files of a repository that the converter reads, the small ones first.

    As in transformers, model.safetensors takes precedence over other weights.
    """
    top = [file for file in repository.files if "/" not in file.path]
    weights = [file for file in top if file.path.endswith(".safetensors")]
    weights = [file for file in weights if file.path == "model.safetensors"] or weights
    templates = [file for file in repository.files if PurePosixPath(file.path).match(CHAT_TEMPLATES)]
    if not weights or not any(file.path == "config.json" for file in top):
        if any(file.path == "adapter_config.json" for file in top):
            raise DownloadError(
                f"{repository.repo} is a LoRA adapter, not a whole model; merge it into its base model (peft: "
                "merge_and_unload, then save_pretrained) and convert that folder"
            )
        raise DownloadError(
            f"{repository.repo} has no checkpoint in safetensors form; give the id of one, or pull a GGUF pair"
        )
    return (*(file for file in top if file.path in _CHECKPOINT_FILES), *templates, *weights)


def remove(name: str) -> tuple[str, int]:
    """Remove a downloaded pair or checkpoint, and the partial files of an interrupted download.

    Returns:
        Its name, and the number of freed bytes.

    Raises:
        ModelNotFound: the name is not valid.
        ModelNotPulled: it is not on this machine.
        DownloadError: several types are on this machine and the name has none, or a file cannot be removed.
    """
    reference = reference_of(name)
    with _locked_manifest():
        entries = read_manifest()
        found = _removable(entries, reference)
        kept = [one for one in entries if one is not found]
        with _remove_errors():
            freed = hub.remove_partial(reference.repo)
            freed += sum(map(hub.remove_cached, _unneeded(found, kept))) if found else 0
        if found is None and not freed:
            raise ModelNotPulled(reference.name, "lfm2vl-edge models lists those that are")
        write_manifest(kept)
    return (display_name(found.repo, found.quant) if found else reference.name), freed


def _removable(entries: Sequence[ManifestEntry], reference: Reference) -> ManifestEntry | None:
    same = [one for one in entries if one.repo.lower() == reference.repo.lower()]
    found = [one for one in same if reference.quant in (None, one.quant)]
    if len(found) > 1:
        names = ", ".join(display_name(one.repo, one.quant) for one in found)
        raise DownloadError(f"{reference.name} may mean {len(found)} models: {names}; give one of these names")
    return found[0] if found else None


def _unneeded(removed: ManifestEntry, kept: Iterable[ManifestEntry]) -> list[Path]:
    """Return the files of an entry that no other entry has."""
    needed = {file.path for one in kept for file in one.files}
    return [file.path for file in removed.files if file.path not in needed]


def _add_entry(entry: ManifestEntry) -> None:
    """Append an entry to the manifest; remove the entry it replaces, with the files that no other entry has."""
    with _locked_manifest():
        entries = read_manifest()
        old = [one for one in entries if (one.repo.lower(), one.quant) == (entry.repo.lower(), entry.quant)]
        kept = [*(one for one in entries if one not in old), entry]
        write_manifest(kept)
        with _remove_errors():
            for path in [path for one in old for path in _unneeded(one, kept)]:
                hub.remove_cached(path)


@contextmanager
def _remove_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DownloadError(f"cannot remove {error.filename}: {error.strerror}; make it writable") from error


@contextmanager
def _locked_manifest() -> Iterator[None]:
    """Let one process at a time change the manifest."""
    from huggingface_hub.utils import WeakFileLock

    try:
        data_folder().mkdir(parents=True, exist_ok=True)
        lock = WeakFileLock(data_folder() / "models.lock")
        lock.__enter__()
    except OSError as error:
        why = error.strerror or error
        raise DownloadError(
            f"cannot write in {data_folder()}: {why}; make it writable, or set LFM2VL_DATA to another folder"
        ) from error
    try:
        yield
    finally:
        lock.__exit__(None, None, None)
