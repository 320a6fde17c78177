"""JSON schemas: read into a tree, written as a grammar for the engine, checked against an answer.

    schema = read_schema({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]})
    grammar = grammar_of(schema)            # the model can then write nothing else
    value = parse_answer(answer, schema)    # and what a grammar cannot express is checked

A keyword that neither the grammar nor the check honours is refused by its name, never passed over. llama.cpp's own
conversion is not used: its C++ is not in the libraries that llama_cpp brings, and the Python beside them passes over
limits of numbers and unknown formats, lets line breaks into strings, which then are no JSON, and does not escape the
backslashes of an enum.
"""

from lfm2vl_edge.structured.check import parse_answer
from lfm2vl_edge.structured.grammar import grammar_of
from lfm2vl_edge.structured.schema import Schema, read_schema

__all__ = ["Schema", "grammar_of", "parse_answer", "read_schema"]
