"""Revisions, sizes and hashes of the registry, as the hub lists them now."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lfm2vl_edge.errors import ConfigError, DownloadError, EdgeError, clip
from lfm2vl_edge.host import write_whole
from lfm2vl_edge.models.hub import RemoteFile, Repository, read_repository
from lfm2vl_edge.models.registry import quant_in_name

KINDS: Final = ("models", "mmprojs")
"""Keys of a row of the registry under which files are listed: language files, and those of encoder and projector."""
_SHA256_DIGITS: Final = 64
Row = dict[str, Any]
"""A model of registry.json: `name`, `repo`, `revision`, `quant`, and the files of each kind."""


def read_rows(table: Path) -> list[Row]:
    """Return the models of a registry.json.

    Raises:
        ConfigError: it is not one.
        OSError: it cannot be read.
    """
    rows: list[Row] = _read(table)["models"]
    return rows


def _read(table: Path) -> Row:
    try:
        content: Row = json.loads(table.read_text(encoding="utf-8"))
        known = {"name", "repo", "revision", "quant", *KINDS}
        is_registry = "licence" in content and all(known <= row.keys() for row in content["models"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{table} is not a registry.json ({clip(str(error))}); check the path") from error
    if not is_registry:
        raise ConfigError(f"{table} is not a registry.json: it lacks keys; check the path")
    return content


def refresh(table: Path, names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Ask the hub for the main branch of models, and write what it says into the table.

    A repository that cannot be read keeps what the table says about it.

    Args:
        table: registry.json.
        names: the models to ask about.

    Returns:
        The error of each model whose repository cannot be read, by name; and a sentence for each change.

    Raises:
        ConfigError: the table is not a registry.json.
        OSError: the table cannot be read or written.
    """
    content = _read(table)
    errors, changes = dict[str, str](), list[str]()
    for number, row in enumerate(content["models"]):
        if row["name"] in names:
            try:
                new = refreshed(row, read_repository(row["repo"], None))
            except EdgeError as error:
                errors[row["name"]] = str(error)
                continue
            changes += differences(row, new)
            content["models"][number] = new
    if changes:
        write_whole(table, [as_text(content).encode()])
    return errors, changes


def refreshed(row: Mapping[str, Any], repository: Repository) -> Row:
    """Return a row with the revision, sizes and SHA-256 hashes of a repository: null for a file that it does not have.

    Raises:
        DownloadError: the repository has none of the row's files of a kind.
    """
    listed = {file.path: file for file in repository.files}
    new = dict(row) | {"revision": repository.commit}
    for kind in KINDS:
        if not any(one["file"] in listed for one in row[kind]):
            raise DownloadError(
                f"{row['repo']} has none of the {kind} that the registry lists; correct their names there"
            )
        new[kind] = [{"file": one["file"], **_facts(listed.get(one["file"]))} for one in row[kind]]
    return new


def _facts(file: RemoteFile | None) -> Row:
    if file is None:
        return {"bytes": None, "sha256": None}
    return {"bytes": file.n_bytes, "sha256": file.digest if len(file.digest) == _SHA256_DIGITS else None}


def differences(row: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each value that differs between two rows of the same model."""
    if row["revision"] != new["revision"]:
        yield f"{row['name']}: revision {row['revision']} -> {new['revision']}"
    for kind in KINDS:
        for old, one in zip(row[kind], new[kind], strict=True):
            if one["bytes"] is None:
                yield f"{row['name']}: the hub has no {one['file']}"
            elif old != one:
                was = "" if old["sha256"] is None else f"; it replaces one of {old['bytes']} bytes, {old['sha256']}"
                yield f"{row['name']}: {one['file']} has {one['bytes']} bytes, SHA-256 {one['sha256']}{was}"


def as_text(content: Mapping[str, Any]) -> str:
    """Return the text of a registry.json: one line for each file."""
    rows = ",\n".join(map(_row_text, content["models"]))
    return f'{{\n "licence": {json.dumps(content["licence"])},\n "models": [\n{rows}\n ]\n}}\n'


def _row_text(row: Mapping[str, Any]) -> str:
    head = [f'"{key}": {json.dumps(row[key])}' for key in ("name", "repo", "revision", "quant")]
    parts = [f'"{kind}": [\n    {_files_text(row[kind])}\n   ]' for kind in KINDS]
    return f"  {{{', '.join(head[:2])},\n   {', '.join(head[2:])},\n   {(',' + chr(10) + '   ').join(parts)}\n  }}"


def _files_text(files: Sequence[Mapping[str, Any]]) -> str:
    return ",\n    ".join(json.dumps({key: one[key] for key in ("file", "bytes", "sha256")}) for one in files)


def smallest_pair(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the types of the smallest language file and the smallest mmproj file of a row.

    Raises:
        DownloadError: the size of no file is known.
    """
    found = [min((one for one in row[kind] if one["bytes"]), key=_size, default=None) for kind in KINDS]
    types = [quant_in_name(one["file"]) for one in found if one is not None]
    if len(types) != len(KINDS) or None in types:
        raise DownloadError(f"no size of a pair of {row['name']} is known; read the hub first")
    return str(types[0]), str(types[1])


def _size(file: Mapping[str, Any]) -> int:
    return int(file["bytes"])
