"""`lfm2vl-edge pull`: a model by name, fetched and verified once."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._loading import pull_visibly
from lfm2vl_edge.cli._output import reporting

Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="REV", help="Branch, tag or commit. Default: the one that is known or here."),
]


def pull(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME[:TYPE]", help="As `models` lists it, or OWNER/REPO of a hub with a GGUF pair."),
    ],
    mmproj_quant: Annotated[
        str | None,
        typer.Option(
            "--mmproj-quant", metavar="TYPE", help="Type of the mmproj file. Default: F16 where there is one."
        ),
    ] = None,
    revision: Revision = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Fetch a model and its mmproj, and verify both: lfm2vl-edge pull lfm2.5-vl-450m:Q8_0.

    An interrupted pull goes on from where it stopped.
    What is here already is verified without asking the hub.
    The files are stored in the cache of huggingface_hub, whose HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE hold.
    """
    from lfm2vl_edge.models.registry import reference_of

    with reporting():
        pulled = pull_visibly(reference_of(name), mmproj_quant=mmproj_quant, revision=revision, quiet=quiet)
        if as_json:
            files = [{"path": str(file.path), "bytes": file.n_bytes, "digest": file.digest} for file in pulled.files]
            shown = {"repo": pulled.repo, "quant": pulled.quant, "revision": pulled.revision, "files": files}
            typer.echo(json.dumps(shown, ensure_ascii=False))
        else:
            typer.echo("\n".join(str(file.path) for file in pulled.files))
