"""`pull` for programs: a model's name becomes its two files on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final

from lfm2vl_edge.errors import DownloadError, ModelNotPulled
from lfm2vl_edge.host import data_folder
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
from lfm2vl_edge.models.names import Pair
from lfm2vl_edge.models.registry import Reference, display_name, quant_of, reference_of

Progress = Callable[[int, int], None]
"""Called with the bytes that are here and the bytes in all."""
_QUANTS: Final = ("Q4_0", "Q4_K_M", "Q8_0", "F16", "BF16", "F32")
"""Types of a language file in the order in which they are taken when none is asked for."""
_MMPROJ_QUANTS: Final = ("F16", "BF16", "Q8_0", "F32")
"""The same for the mmproj: the fastest that is exact everywhere first, F32 last for its size."""
_UNTYPED: Final = "GGUF"
"""Stands for the type of a file whose name tells none."""
_ARCHITECTURE: Final = "lfm2"
_INDEX: Final = "model.safetensors.index.json"
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
        _INDEX,
    }
)
"""What the converter reads of a checkpoint, besides its safetensors files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What is about to be fetched: to be shown before a byte of it is."""

    name: str
    """What was asked for."""
    repository: Repository
    """Where it comes from, at which commit."""
    files: tuple[RemoteFile, ...]
    """Of a pair: the language file, then the mmproj."""
    licence: str
    """Licence of the weights, in a phrase."""

    @property
    def n_bytes(self) -> int:
        """Size of all files."""
        return sum(file.n_bytes for file in self.files)

    @property
    def missing_bytes(self) -> int:
        """What of it is not here yet."""
        return sum(hub.missing_bytes(self.repository, file) for file in self.files)


Show = Callable[[Offer], None]
"""Shows what is about to be fetched; what it raises ends the matter."""


def pull_reference(
    reference: Reference,
    *,
    mmproj_quant: str | None = None,
    revision: str | None = None,
    show: Show | None = None,
    progress: Progress | None = None,
) -> ManifestEntry:
    """Fetch and verify a pair, and remember it as the one that was pulled last.

    What is here already is only verified, without asking the hub, unless another revision is asked for.

    Args:
        reference: the repository, and the type of the language file.
        mmproj_quant: type of the mmproj; by default the one that is here, or the first of `_MMPROJ_QUANTS`.
        revision: a branch, tag or commit; by default the one that is here, the one of the table, or the main branch.
        show: called once before anything is fetched.
        progress: called after each piece.

    Raises:
        DownloadError: the hub has no such pair or cannot be reached, the disk is full, or a file arrived damaged.
        ConfigError: the two files are no pair of an LFM2-VL model.
    """
    usual = reference.known.quant if reference.known else None
    here = find_entry(read_manifest(), reference.repo, reference.quant, usual)
    if here is None or not _serves(here, mmproj_quant, revision) or not _is_sound(here, progress):
        pin = revision or (here.revision if here else None)
        if here and reference.quant is None:
            reference = replace(reference, quant=here.quant)
        here = _fetch_pair(reference, mmproj_quant, pin, show, progress)
    _remember(here)
    return here


def _serves(here: ManifestEntry, mmproj_quant: str | None, revision: str | None) -> bool:
    same_mmproj = mmproj_quant is None or quant_of(here.files[1].path.name) == mmproj_quant.upper()
    return same_mmproj and revision in (None, here.revision)


def _is_sound(here: ManifestEntry, progress: Progress | None) -> bool:
    """Tell whether all files are what they were when they were fetched."""
    done = 0
    for file in here.files:
        try:
            if not file.is_there or not hub.is_right(file.path, file.digest):
                return False
        except OSError:
            return False
        done += file.n_bytes
        if progress is not None:
            progress(done, here.n_bytes)
    return True


def _fetch_pair(
    reference: Reference, mmproj_quant: str | None, pin: str | None, show: Show | None, progress: Progress | None
) -> ManifestEntry:
    known = reference.known
    repository = hub.read_repository(reference.repo, pin or (known.revision if known else None))
    model, mmproj = _choose(repository, reference, mmproj_quant)
    if known and pin in (None, known.revision):
        _compare_with_table(reference, (model, mmproj))
    licence = (known.licence if known else repository.licence) or "not stated; see the model card"
    offer = Offer(name=reference.name, repository=repository, files=(model, mmproj), licence=licence)
    files = _fetch_all(offer, show, progress)
    read_facts(Pair(model=files[0].path, mmproj=files[1].path))
    return ManifestEntry(repo=reference.repo, quant=_type_of(model), revision=repository.commit, files=files)


def _choose(repository: Repository, reference: Reference, mmproj_quant: str | None) -> tuple[RemoteFile, RemoteFile]:
    """Return the language file and the mmproj."""
    ggufs = [file for file in repository.files if file.path.lower().endswith(".gguf")]
    models = [file for file in ggufs if "mmproj" not in PurePosixPath(file.path).name.lower()]
    mmprojs = [file for file in ggufs if file not in models]
    if not models:
        raise DownloadError(f"{repository.repo} holds no GGUF model{_what_instead(repository)}")
    if not mmprojs:
        raise DownloadError(f"{repository.repo} holds no mmproj file, so its model would be blind; pull another one")
    if repository.architecture not in (None, _ARCHITECTURE):
        raise DownloadError(f"{repository.repo} holds a {repository.architecture!r} model, not LFM2-VL; pull another")
    known = reference.known
    usual, usual_mmproj = ((known.quant,), (known.mmprojs[0].quant,)) if known else ((), ())
    return (
        _of_type(repository.repo, models, reference.quant, usual + _QUANTS),
        _of_type(repository.repo, mmprojs, mmproj_quant, usual_mmproj + _MMPROJ_QUANTS),
    )


def _what_instead(repository: Repository) -> str:
    if any(file.path == "config.json" for file in repository.files):
        return f" but a checkpoint; to make a pair of it: lfm2vl-edge convert {repository.repo}"
    return "; give a repository with a language file and its mmproj"


def _type_of(file: RemoteFile) -> str:
    return quant_of(file.path) or _UNTYPED


def _of_type(repo: str, files: Sequence[RemoteFile], quant: str | None, usual: Sequence[str]) -> RemoteFile:
    """Return the file of a type, or of the first usual one that there is."""
    by_type = {_type_of(file): file for file in reversed(files)}
    if quant is not None and quant.upper() not in by_type:
        raise DownloadError(f"{repo} has no file of type {quant}; there are: {', '.join(sorted(by_type))}")
    wanted = [quant.upper()] if quant is not None else usual
    return next((by_type[one] for one in wanted if one in by_type), min(files, key=lambda file: file.n_bytes))


def _compare_with_table(reference: Reference, files: Iterable[RemoteFile]) -> None:
    """Check that the hub's hashes are those that this program was shipped with, where it was."""
    for file in files:
        known = reference.known.file(file.path) if reference.known else None
        if known is not None and known.sha256 not in (None, file.digest):
            raise DownloadError(
                f"{file.path} of {reference.repo} is not the file that this program knows: it was replaced on "
                "the hub; update this program, or take what is there: "
                f"lfm2vl-edge pull {reference.name} --revision main"
            )


def _fetch_all(offer: Offer, show: Show | None, progress: Progress | None) -> tuple[ManifestFile, ...]:
    if show is not None:
        show(offer)
    _check_space(offer.missing_bytes)
    done, fetched = 0, []
    for file in offer.files:

        def tell(have: int, before: int = done) -> None:
            if progress is not None:
                progress(before + have, offer.n_bytes)

        path = hub.fetch(offer.repository, file, tell)
        fetched.append(ManifestFile(path=path, n_bytes=file.n_bytes, digest=file.digest))
        done += file.n_bytes
    return tuple(fetched)


def _check_space(needed: int) -> None:
    """Raise a DownloadError if the disk has less free bytes than are needed."""
    folder = hub.hub_cache()
    existing = next(one for one in (folder, *folder.parents) if one.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DownloadError(
            f"{needed / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free on the disk of {existing}; "
            "make room, or set HF_HOME to a folder on another disk"
        )


def fetch_checkpoint(
    repo: str, *, revision: str | None = None, show: Show | None = None, progress: Progress | None = None
) -> list[Path]:
    """Return the files of a checkpoint that the converter needs, after fetching what is missing.

    If they are all here the hub is not asked, unless another revision is asked for.

    Raises:
        DownloadError: the repository holds no checkpoint, or as for `pull`.
    """
    here = find_checkpoint(read_manifest(), repo)
    if here is None or not _is_sound(here, None) or revision not in (None, here.revision):
        repository = hub.read_repository(repo, revision)
        files = _checkpoint_files(repository)
        licence = repository.licence or "not stated; see the model card"
        offer = Offer(name=repo, repository=repository, files=files, licence=licence)
        fetched = _fetch_all(offer, show, progress)
        here = ManifestEntry(repo=repo, quant=None, revision=repository.commit, files=fetched)
        _remember(here)
    return [file.path for file in here.files]


def _checkpoint_files(repository: Repository) -> tuple[RemoteFile, ...]:
    """Return the files at the top of a repository that a conversion reads, the small ones first."""
    top = [file for file in repository.files if "/" not in file.path]
    weights = [file for file in top if file.path.endswith(".safetensors")]
    if not weights or not any(file.path == "config.json" for file in top):
        raise DownloadError(
            f"{repository.repo} holds no checkpoint in safetensors form; give the id of one, or pull a GGUF pair"
        )
    return (*(file for file in top if file.path in _CHECKPOINT_FILES), *weights)


def remove(reference: Reference) -> tuple[str, int]:
    """Remove a pulled pair, or what was begun of it, or a fetched checkpoint.

    Returns:
        Its name, and the bytes that are free now.

    Raises:
        ModelNotPulled: it is not here.
        DownloadError: it has several types and none was named, or a file cannot be removed.
    """
    with _locked():
        entries = read_manifest()
        found = _removable(entries, reference)
        kept = [one for one in entries if one is not found]
        try:
            freed = hub.remove_partial(reference.repo)
            freed += sum(map(hub.forget, _unneeded(found, kept))) if found else 0
        except OSError as error:
            raise DownloadError(f"cannot remove {error.filename}: {error.strerror}; make it writable") from error
        if found is None and not freed:
            raise ModelNotPulled(reference.name, "lfm2vl-edge models lists what is")
        write_manifest(kept)
    return (display_name(found.repo, found.quant) if found else reference.name), freed


def _removable(entries: Sequence[ManifestEntry], reference: Reference) -> ManifestEntry | None:
    same = [one for one in entries if one.repo.lower() == reference.repo.lower()]
    found = [one for one in same if reference.quant in (None, one.quant)]
    if len(found) > 1:
        names = ", ".join(display_name(one.repo, one.quant) for one in found)
        raise DownloadError(f"{len(found)} models fit {reference.name}: {names}; say which one")
    return found[0] if found else None


def _unneeded(gone: ManifestEntry, kept: Iterable[ManifestEntry]) -> list[Path]:
    """Return the files of an entry that no other one has."""
    needed = {file.path for one in kept for file in one.files}
    return [file.path for file in gone.files if file.path not in needed]


def _remember(entry: ManifestEntry) -> None:
    """Put an entry at the end of the list; what it replaces is removed, if no other entry needs it."""
    with _locked():
        entries = read_manifest()
        old = [one for one in entries if (one.repo.lower(), one.quant) == (entry.repo.lower(), entry.quant)]
        kept = [one for one in entries if one not in old]
        write_manifest([*kept, entry])
        try:
            for path in [path for one in old for path in _unneeded(one, [*kept, entry])]:
                hub.forget(path)
        except OSError as error:
            raise DownloadError(f"cannot remove {error.filename}: {error.strerror}; make it writable") from error


@contextmanager
def _locked() -> Iterator[None]:
    """Let one process at a time change the list of what was pulled."""
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


def pull(
    name: str,
    *,
    mmproj_quant: str | None = None,
    revision: str | None = None,
    show: Show | None = None,
    progress: Progress | None = None,
) -> Pair:
    """Fetch a model and its mmproj, verify both, and return where they lie; `Model.open` then takes the name.

    It does what the command does: an interrupted pull goes on from where it stopped, and what is here already is
    verified without asking the hub. Warnings (another try after a break) go to the log `lfm2vl_edge.models.hub`.

    Args:
        name: such as `lfm2.5-vl-450m`, `lfm2.5-vl-450m:Q8_0`, or `owner/repo[:TYPE]` of a hub with a GGUF pair.
        mmproj_quant: type of the mmproj file; by default the one that is here, or F16 if there is one.
        revision: a branch, tag or commit; by default the one that is here or known, else the main branch.
        show: called once before anything is fetched, with an offer: its files, sizes and licence. What it raises ends
            the matter.
        progress: called with the bytes that are here and the bytes in all.

    Raises:
        ModelNotFound: there is no such name.
        DownloadError: the hub has no such pair or cannot be reached, the disk is full, or a file arrived damaged.
        ConfigError: the two files are no pair of an LFM2-VL model.
    """
    reference = reference_of(name)
    pulled = pull_reference(reference, mmproj_quant=mmproj_quant, revision=revision, show=show, progress=progress)
    model, mmproj = (file.path for file in pulled.files)
    return Pair(model=model, mmproj=mmproj)
