"""`pull` for programs: a model's name becomes its two files on this machine."""

from __future__ import annotations

from lfm2vl_edge import download
from lfm2vl_edge.download import Progress, Show
from lfm2vl_edge.pair import Pair
from lfm2vl_edge.registry import reference_of


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
    verified without asking the hub. Warnings (another try after a break) go to the log `lfm2vl_edge.hub`.

    Args:
        name: such as `lfm2.5-vl-450m`, `lfm2.5-vl-450m:Q8_0`, or `owner/repo[:TYPE]` of a hub with a GGUF pair.
        mmproj_quant: type of the mmproj file; by default the one that is here, or F16 where there is one.
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
    pulled = download.pull(reference, mmproj_quant=mmproj_quant, revision=revision, show=show, progress=progress)
    model, mmproj = (file.path for file in pulled.files)
    return Pair(model=model, mmproj=mmproj)
