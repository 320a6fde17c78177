"""Structured answers: grammars for the engine, checks of the answer, and lists of boxes.

Imports errors, config and the engine's check of grammars.

    schema = read_schema({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]})
    grammar = grammar_of(schema)            # restricts the tokens of the answer
    value = parse_answer(answer, schema)    # checks also what a grammar cannot express
"""

from lfm2vl_edge.structured.grammar import read_grammar, read_regex
from lfm2vl_edge.structured.schema import Schema, grammar_of, parse_answer, read_schema, unbounded_part

__all__ = ["Schema", "grammar_of", "parse_answer", "read_grammar", "read_regex", "read_schema", "unbounded_part"]
