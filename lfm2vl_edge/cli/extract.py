"""`lfm2vl-edge extract`: what a schema asks for, read off an image."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._answers import Image, Prompt, answering
from lfm2vl_edge.cli._loading import read_schema_file, refuse_stdin_twice
from lfm2vl_edge.cli._output import reporting


@opt.takes_groups
def extract(
    image: Image,
    schema: Annotated[
        str, typer.Option("--schema", "-s", metavar="FILE|-", help="JSON schema of what is wanted; - is stdin.")
    ],
    model: opt.ModelOptions,
    images: opt.ImageOptions,
    answer: opt.ExactOptions,
    prompt: Prompt = None,
    cache: opt.Cache = None,
    max_megapixels: opt.MaxMegapixels = 200,
    verbose: opt.Verbose = 0,
) -> None:
    """Read off an image what a JSON schema asks for: lfm2vl-edge extract receipt.jpg --schema receipt.json.

    The answer is one line of JSON that fits the schema, or an error.
    """
    with reporting():
        refuse_stdin_twice([image, schema])
        wanted = read_schema_file(schema)
    with answering(image, max_megapixels, model, images, verbose, cache) as (opened, pixels):
        found = opened.extract(pixels, wanted, prompt, **answer.values())
        typer.echo(json.dumps(found, ensure_ascii=False))
