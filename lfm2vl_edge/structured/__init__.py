"""Structured answers: a JSON schema as a grammar for the engine and as a check of the answer, and lists of boxes.

Imports only errors and config.

    schema = read_schema({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]})
    grammar = grammar_of(schema)            # restricts the tokens of the answer
    value = parse_answer(answer, schema)    # checks also what a grammar cannot express

A keyword that neither the grammar nor the check supports is an error, never ignored. llama.cpp's own converter is not
used: the C++ version is not in the libraries of llama_cpp, and the Python version of llama_cpp ignores limits of
numbers and unknown formats, allows line breaks in strings, which is not valid JSON, and does not escape the
backslashes of an enum.
"""

from lfm2vl_edge.structured.check import parse_answer
from lfm2vl_edge.structured.grammar import grammar_of
from lfm2vl_edge.structured.schema import Schema, read_schema

__all__ = ["Schema", "grammar_of", "parse_answer", "read_schema"]
