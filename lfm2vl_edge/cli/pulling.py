"""What `pull`, `convert` and the offer of `run` share: the lines before a download and the bar during it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lfm2vl_edge.cli.output import bytes_bar, say, shows_progress, warnings_to_stderr
from lfm2vl_edge.errors import DownloadError

if TYPE_CHECKING:
    from lfm2vl_edge.download import Offer
    from lfm2vl_edge.pulled import Pulled
    from lfm2vl_edge.registry import Reference


def pull_visibly(
    reference: Reference, *, mmproj_quant: str | None = None, revision: str | None = None, quiet: bool = False
) -> Pulled:
    """Pull a pair; what is fetched and how far it got goes to stderr.

    Raises:
        EdgeError: see `download.pull`.
    """
    from lfm2vl_edge.download import pull

    warnings_to_stderr()
    with bytes_bar("pulling", shows_progress(quiet)) as progress:
        return pull(
            reference,
            mmproj_quant=mmproj_quant,
            revision=revision,
            show=None if quiet else show_offer,
            progress=progress,
        )


@contextmanager
def checkpoint_files(name: str, revision: str | None, *, quiet: bool) -> Iterator[Path]:
    """Give the folder of a checkpoint: a local one, or one called like the repository with links to fetched files.

    The cache calls its folders by commit; the converter calls its files as the folder is called.

    Raises:
        EdgeError: see `download.fetch_checkpoint`.
    """
    from lfm2vl_edge.registry import is_hub_id

    if not is_hub_id(name) or Path(name).exists() or Path(name).parent.is_dir():
        if revision is not None:
            raise DownloadError(f"--revision is for checkpoints of the hub; {name!r} is a local path")
        yield Path(name)
        return
    from lfm2vl_edge.download import fetch_checkpoint

    warnings_to_stderr()
    with bytes_bar("fetching", shows_progress(quiet)) as progress:
        files = fetch_checkpoint(name, revision=revision, show=None if quiet else show_offer, progress=progress)
    with tempfile.TemporaryDirectory(prefix="lfm2vl-checkpoint-") as temporary:
        folder = Path(temporary) / name.rpartition("/")[2]
        folder.mkdir()
        for file in files:
            (folder / file.name).symlink_to(file)
        yield folder


def show_offer(offer: Offer) -> None:
    """Say what is about to be fetched, and under which licence."""
    missing = offer.missing_bytes
    rest = "" if missing == offer.n_bytes else f", {megabytes(missing)} of it not here yet"
    lines = [f"{offer.name}: {megabytes(offer.n_bytes)}{rest}, revision {offer.repository.commit}"]
    big = [file for file in offer.files if file.path.endswith((".gguf", ".safetensors"))]
    lines += [f"  {file.path}  {megabytes(file.n_bytes)}" for file in big]
    say("\n".join([*lines, f"licence of the weights: {offer.licence}"]))


def megabytes(n_bytes: int | None) -> str:
    """Return a size as people say it, `?` if it is not known."""
    if n_bytes is None:
        return "?"
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
