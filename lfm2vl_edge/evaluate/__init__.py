"""How good a model is on questions whose answers are known.

```python
from lfm2vl_edge import Model
from lfm2vl_edge.evaluate import (evaluate, read_rows, summarise)

with Model.open("models/450m") as model:
    print(summarise(evaluate(model, read_rows("data.jsonl"))).total.normalised)
```
"""

from lfm2vl_edge.evaluate.results import BoxTally, Reply, Result, Summary, Tally, summarise
from lfm2vl_edge.evaluate.rows import Row, read_rows
from lfm2vl_edge.evaluate.run import MAX_TOKENS, evaluate
from lfm2vl_edge.evaluate.score import Score, iou, mean_iou, normalised, score

__all__ = [
    "MAX_TOKENS",
    "BoxTally",
    "Reply",
    "Result",
    "Row",
    "Score",
    "Summary",
    "Tally",
    "evaluate",
    "iou",
    "mean_iou",
    "normalised",
    "read_rows",
    "score",
    "summarise",
]
