"""Files of a batch, on this machine or in a store of objects (s3://, gs://) through pyarrow's filesystems."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import IO, Any, Final

from lfm2vl_edge.errors import DataError, EdgeError, clip, shorten

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
    filesystem, path = filesystem_of(url)
    from pyarrow import fs

    scheme = url.partition("://")[0]
    try:
        found = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot list {shorten(url)}: {clip(str(error))}; check the URL") from None
    return [f"{scheme}://{one.path}" for one in found if one.type == fs.FileType.File]
