"""Files of a batch, on this machine or in a store of objects (s3://, gs://) through pyarrow's filesystems."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from lfm2vl_edge.errors import DataError, EdgeError, clip, shorten
from lfm2vl_edge.host import write_whole

REMOTE: Final = ("s3://", "gs://", "gcs://")
"""The start of URLs that pyarrow's filesystems open."""


def arrow() -> Any:
    """Return pyarrow.

    Raises:
        EdgeError: it is not installed.
    """
    try:
        import pyarrow
    except ImportError:
        raise EdgeError("Parquet files, s3:// and gs:// need pyarrow; pip install 'lfm2vl-edge[batch]'") from None
    return pyarrow


def parquet() -> Any:
    """Return pyarrow's module of Parquet files; errors as for `arrow`."""
    arrow()
    import pyarrow.parquet

    return pyarrow.parquet


@dataclass(frozen=True, slots=True)
class Place:
    """A file, by its path or its URL."""

    name: str

    @property
    def is_remote(self) -> bool:
        """Whether it is in a store of objects."""
        return self.name.lower().startswith(REMOTE)

    @property
    def folder(self) -> str:
        """What precedes the name of a file beside it, with its separator; empty for the working directory."""
        head, separator, _ = self.name.rpartition("/")
        return head + separator

    def open(self) -> IO[bytes]:
        """Open the file to be read.

        Raises:
            DataError: it cannot be.
        """
        try:
            if not self.is_remote:
                return open(self.name, "rb")  # noqa: PTH123  # the caller closes it
            filesystem, path = filesystem_of(self.name)
            return filesystem.open_input_file(path)  # type: ignore[no-any-return]
        except FileNotFoundError:
            raise DataError(f"there is no file at {shorten(self.name)}; check the path") from None
        except (OSError, ValueError) as error:
            why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else clip(str(error))
            raise DataError(f"cannot read {shorten(self.name)}: {why}; check the path and its permissions") from None


def filesystem_of(url: str) -> tuple[Any, str]:
    """Return pyarrow's filesystem of a URL or path, and the path in it.

    Raises:
        DataError: the URL is not valid, or this pyarrow has no such filesystem.
    """
    arrow()
    from pyarrow import fs

    try:
        if url.lower().startswith(REMOTE):
            filesystem, path = fs.FileSystem.from_uri(url)
        else:
            filesystem, path = fs.LocalFileSystem(), os.path.abspath(url)  # noqa: PTH100
    except (OSError, ValueError) as error:
        raise DataError(f"cannot open {shorten(url)}: {clip(str(error))}; check the URL") from None
    return filesystem, path


def remote_files(url: str) -> list[str]:
    """Return the URLs of all files below a URL.

    Raises:
        DataError: it cannot be listed.
    """
    scheme = url.partition("://")[0]
    return [f"{scheme}://{path}" for path in _listed(url)]


def _listed(url: str) -> list[str]:
    filesystem, path = filesystem_of(url)
    from pyarrow import fs

    try:
        found = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot list {shorten(url)}: {clip(str(error))}; check the URL") from None
    return [one.path for one in found if one.type == fs.FileType.File]


class Folder:
    """A folder of files that are written whole, here or in a store of objects.

    Attributes:
        name: its path or URL.
        is_remote: whether it is in a store of objects.
    """

    def __init__(self, name: str) -> None:
        self.name = name.rstrip("/")
        self.is_remote = Place(name).is_remote
        self.path = Path(self.name)

    def names(self) -> list[str]:
        """Return the names of its files, sorted; none if it does not exist.

        Raises:
            DataError: it cannot be listed.
        """
        if self.is_remote:
            return sorted(one.rpartition("/")[2] for one in _listed(self.name))
        try:
            return sorted(one.name for one in self.path.iterdir()) if self.path.is_dir() else []
        except OSError as error:
            raise unwritable(self.name, error) from error

    def read(self, name: str) -> bytes:
        """Return the bytes of a file; errors as for `Place.open`."""
        with Place(f"{self.name}/{name}").open() as file:
            return file.read()

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write a file, whole or not at all.

        Raises:
            DataError: it cannot be written.
        """
        try:
            if not self.is_remote:
                write_whole(self.path / name, [data])
                return
            filesystem, path = filesystem_of(f"{self.name}/{name}")
            with filesystem.open_output_stream(path) as file:
                file.write(data)
        except OSError as error:
            raise unwritable(f"{self.name}/{name}", error) from error

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        if not self.is_remote:
            (self.path / name).unlink(missing_ok=True)
        elif name in self.names():
            filesystem, path = filesystem_of(f"{self.name}/{name}")
            filesystem.delete_file(path)


def unwritable(name: str | os.PathLike[str], error: Exception) -> DataError:
    """Return the error of a file that cannot be written."""
    why = getattr(error, "strerror", None) or clip(str(error))
    return DataError(f"cannot write {clip(str(name))}: {why}; make room or give another path, and run it again")
