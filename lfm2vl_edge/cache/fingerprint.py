"""What must be equal for two results to be the same bits: files by content, native code, settings.

Files are hashed whole: a sample of blocks could miss a small tensor that changed, and exactness is the rule here. It
takes about a second per gigabyte, so a digest is kept by path, size and modification time if there is a folder for it.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lfm2vl_edge.config import ImageConfig
from lfm2vl_edge.engine import EngineInfo
from lfm2vl_edge.errors import EngineError, ModelNotFound, clip
from lfm2vl_edge.host import write_whole
from lfm2vl_edge.models.names import Pair, Stamp, stamp
from lfm2vl_edge.planning.budget import ImageBudget

_BLOCK: Final = 1 << 20
_HEX_DIGITS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """Where a state of the engine comes from; a difference in any field means other bits.

    Attributes:
        model: digest of the language file and the mmproj file.
        engine: digest of the native code and of the processor features that it found.
        settings: settings of the engine and of the images.
    """

    model: str
    engine: str
    settings: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedFiles:
    """The files of a model as they were when it was opened."""

    pair: Pair
    stamps: tuple[Stamp, Stamp]
    """State of both files in the file system then; a file that was replaced since is not the one in memory."""

    @classmethod
    def of(cls, pair: Pair) -> OpenedFiles:
        """Note the state of a model's files, before they are opened.

        Raises:
            ModelNotFound: a file is missing.
        """
        return cls(pair=pair, stamps=(stamp(pair.model), stamp(pair.mmproj)))

    def check_sizes(self) -> None:
        """Check that no file was truncated since: its memory is mapped, and reading past its end ends the process.

        A file that was removed or replaced by another one is still there for those who opened it.

        Raises:
            EngineError: a file was truncated.
        """
        for path, (size, _, inode) in zip((self.pair.model, self.pair.mmproj), self.stamps, strict=True):
            with suppress(OSError):
                facts = path.stat()
                if facts.st_ino == inode and facts.st_size < size:
                    raise EngineError(
                        f"{path} was truncated from {size} to {facts.st_size} bytes while the model was open; "
                        "download or convert it again, and open the model again"
                    )

    def digests(self, memo: Path | None) -> tuple[str, str]:
        """Return the digests of the language file and the mmproj file.

        Raises:
            ModelNotFound: a file is missing, or was replaced.
        """
        return (
            file_digest(self.pair.model, memo, self.stamps[0]),
            file_digest(self.pair.mmproj, memo, self.stamps[1]),
        )


def fingerprint_of(
    files: OpenedFiles, info: EngineInfo, image: ImageConfig, budget: ImageBudget, memo: Path | None
) -> Fingerprint:
    """Return the fingerprint of an opened model.

    Args:
        files: its files.
        info: facts about its engine.
        image: the image settings in use.
        budget: what one image may take.
        memo: a folder that keeps digests of files, or None.

    Raises:
        ModelNotFound: a file is missing, or was replaced.
    """
    return Fingerprint(
        model=_digest(*files.digests(memo)),
        engine=engine_digest(info, memo),
        settings=f"{info.language_settings}; encoder {info.encoder_settings}; {image}; {budget.key}",
    )


def encoder_digest(files: OpenedFiles, info: EngineInfo, memo: Path | None) -> str:
    """Return the digest of everything but the pixels that decides an embedding.

    Raises:
        ModelNotFound: the mmproj file is missing, or was replaced.
    """
    mmproj = file_digest(files.pair.mmproj, memo, files.stamps[1])
    return _digest(mmproj, engine_digest(info, memo), info.encoder_settings)


def state_digest(files: OpenedFiles, info: EngineInfo, memo: Path | None) -> str:
    """Return the digest of everything but the prompt that decides a state of the sequence.

    Raises:
        ModelNotFound: a file is missing, or was replaced.
    """
    settings = info.language_settings, info.encoder_settings
    return _digest(*files.digests(memo), engine_digest(info, memo), *settings)


def engine_digest(info: EngineInfo, memo: Path | None) -> str:
    """Return the digest of the engine's native code and of the processor features that it uses."""
    return _digest(info.system, *(file_digest(path, memo) for path in info.libraries))


def file_digest(path: Path, memo: Path | None = None, then: Stamp | None = None) -> str:
    """Return the SHA-256 of a file as hex digits.

    Args:
        path: the file.
        memo: a folder that keeps digests; a file unchanged in size and time is not read again.
        then: what `stamp` returned when the file was opened; by default it may be any file.

    Raises:
        ModelNotFound: the file is missing, cannot be read, or is not the one that was opened.
    """
    now = stamp(path)
    if then is not None and now != then:
        raise ModelNotFound(f"{path} was replaced after the model was opened; open it again")
    note = memo / _digest(str(path.resolve()), *map(str, now)) if memo is not None else None
    if note is not None and (known := _known(note)):
        return known
    try:
        digest = _hash(path)
    except OSError as error:
        raise ModelNotFound(f"cannot read {clip(str(path))}: {error.strerror or error}; check the path") from error
    if note is not None:
        with suppress(OSError):  # if nothing can be kept, it is computed again
            write_whole(note, [digest.encode()])
    return digest


def _hash(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return state.hexdigest()


def _known(note: Path) -> str | None:
    try:
        with note.open("rb") as file:
            text = file.read(_HEX_DIGITS + 1).decode("ascii", "replace")
    except OSError:
        return None
    return text if len(text) == _HEX_DIGITS and set(text) <= set("0123456789abcdef") else None


def _digest(*parts: str) -> str:
    """Return the SHA-256 of several texts, as hex digits; no two lists of texts share one."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode()
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()
