"""JSON schemas: read into a tree, written as a grammar for the engine, checked against an answer.

    schema = read_schema({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]})
    grammar = grammar_of(schema)            # the model can then write nothing else
    value = parse_answer(answer, schema)    # and what a grammar cannot express is checked

A keyword that neither the grammar nor the check honours is refused by its name, never passed over. llama.cpp's own
conversion, as llama_cpp brings it, is not used: it leaves limits of numbers, minItems beside prefixItems and formats
out without a word, lets line breaks into strings, which then are no JSON, and does not escape backslashes of enums.
"""

from lfm2vl_edge.schema.check import parse_answer
from lfm2vl_edge.schema.gbnf import TEXT_RULES, grammar_of, literal, rule_lines
from lfm2vl_edge.schema.nodes import Schema
from lfm2vl_edge.schema.reading import read_schema

__all__ = ["TEXT_RULES", "Schema", "grammar_of", "literal", "parse_answer", "read_schema", "rule_lines"]
