"""Accepted schemas, and wrong answers let through, of public collections: python -m benchmarks.schemas FOLDER... [-v].

EVERY=12 in the environment takes every twelfth file only.

A folder holds MaskBench (guidance-ai/jsonschemabench, maskbench/data: one schema and its tests per file) or a draft of
the JSON Schema Test Suite (tests/draft2020-12: a list of schemas with tests per file), unpacked.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lfm2vl_edge import Model
from lfm2vl_edge.engine import Constraint
from lfm2vl_edge.engine.grammar import Follower
from lfm2vl_edge.engine.llama import LlamaEngine
from lfm2vl_edge.errors import AnswerError, ConfigError, EngineError
from lfm2vl_edge.structured import Schema, grammar_of, parse_answer, read_schema


def cases(folder: Path, step: int = 1) -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """Yield name, schema and tests of every file; the tests state `data` and whether it is `valid`."""
    for path in sorted(folder.rglob("*.json"))[::step]:
        content = json.loads(path.read_text(encoding="utf-8"))
        for part in content if isinstance(content, list) else [content]:
            if isinstance(part, dict) and "schema" in part and "tests" in part:
                yield f"{path.stem}: {part.get('description', '')}", part["schema"], part["tests"]


def passes(engine: LlamaEngine, schema: Schema, data: Any) -> bool:
    """Return whether a value could be an answer under a schema."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    tokenizer = engine._tokenizer().result()  # noqa: SLF001  # the benchmark samples nothing
    follower = Follower(tokenizer, Constraint(grammar=grammar_of(schema)))
    if not follower.matches(engine.tokenize(text)):
        return False
    try:
        parse_answer(text, schema)
    except AnswerError:
        return False
    return True


def outcome(engine: LlamaEngine, schema: Any, tests: list[dict[str, Any]]) -> tuple[str, str]:
    """Return what happens under a schema, and the reason."""
    try:
        read = read_schema(schema)
        engine.check_grammar(grammar_of(read))
        wrong = [test for test in tests if passes(engine, read, test["data"]) != test["valid"]]
    except (ConfigError, EngineError) as error:
        return "refused", str(error)
    if any(not test["valid"] for test in wrong):
        return "invalid let through", next(test.get("description", "") for test in wrong if not test["valid"])
    if wrong:
        return "valid refused", json.dumps(wrong[0]["data"])[:200]
    return "right", ""


def main() -> None:
    """Count the outcomes of each folder, and list them with -v."""
    folders = [Path(one) for one in sys.argv[1:] if not one.startswith("-")]
    with Model.open("tiny") as model:
        for folder in folders:
            counts: Counter[str] = Counter()
            for name, schema, tests in cases(folder, int(os.environ.get("EVERY", "1"))):
                result, reason = outcome(model.engine, schema, tests)  # type: ignore[arg-type]
                counts[result] += 1
                if "-v" in sys.argv and result != "right":
                    print(f"{result}\t{name}\t{reason}")
            total = sum(counts.values())
            for result, count in counts.most_common():
                print(f"{folder.name}: {result}: {count} of {total} ({count / total:.1%})")


if __name__ == "__main__":
    main()
