"""`lfm2vl-edge pull`: download and verify a model by name."""

from __future__ import annotations

from typing import Annotated

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._loading import pull_visibly
from lfm2vl_edge.cli._output import on_line, reporting, to_json, write_out


def pull(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME[:TYPE]", help="A name from `models`, or OWNER/REPO of a hub with a GGUF pair."),
    ],
    mmproj_quant: Annotated[
        str | None,
        typer.Option("--mmproj-quant", metavar="TYPE", help="Type of the mmproj file. Default: F16 if there is one."),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(
            "--revision",
            parser=opt.as_text,
            metavar="REV",
            help="Branch, tag or commit. Default: the downloaded or known one.",
        ),
    ] = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Download a model and its mmproj, and verify both: lfm2vl-edge pull lfm2.5-vl-450m:Q8_0.

    An interrupted download is continued.
    A model that is on this machine is verified without asking the hub.
    The files are stored in huggingface_hub's cache; HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are honoured.
    """
    with reporting():
        entry = pull_visibly(name, mmproj_quant=mmproj_quant, revision=revision, quiet=quiet)
        if as_json:
            files = [{"path": str(file.path), "bytes": file.n_bytes, "digest": file.digest} for file in entry.files]
            shown = {"repo": entry.repo, "quant": entry.quant, "revision": entry.revision, "files": files}
            write_out(to_json(shown))
        else:
            write_out("\n".join(on_line(file.path) for file in entry.files))
