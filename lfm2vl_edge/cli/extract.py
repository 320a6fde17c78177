"""`lfm2vl-edge extract`: what a JSON schema describes, read from an image."""

from __future__ import annotations

from typing import Annotated

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._answers import Image, Prompt, answering
from lfm2vl_edge.cli._output import reporting, to_json, write_out


@opt.takes_groups
def extract(
    image: Image,
    schema: Annotated[
        str, typer.Option("--schema", "-s", metavar="FILE|-", help="JSON schema of the answer; - is stdin.")
    ],
    model: opt.AskedModelOptions,
    images: opt.ImageOptions,
    answer: opt.ExactOptions,
    prompt: Prompt = None,
    cache: opt.Cache = None,
    verbose: opt.Verbose = 0,
) -> None:
    """Read what a JSON schema describes from an image: lfm2vl-edge extract receipt.jpg --schema receipt.json.

    The answer is one line of JSON that matches the schema, or an error.
    """
    with reporting():
        opt.refuse_stdin_twice([image, schema])
        described = opt.read_schema_file(schema)
    with answering(image, model, images, answer, verbose, cache) as (opened, loaded):
        found = opened.extract(loaded, described, prompt, **answer.values())
        write_out(to_json(found))
