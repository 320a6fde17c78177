"""How good a model is on questions whose answers are known.

```python
from lfm2vl_edge import Model
from lfm2vl_edge.evaluate import (evaluate, read_rows, summarise)

with Model.open("models/450m") as model:
    print(summarise(evaluate(model, read_rows("data.jsonl"))).total.normalised)
```
"""

from lfm2vl_edge.evaluate.reliability import Bin, ChoiceTally, Fit, Weighed, draw_reliability, fit_choices
from lfm2vl_edge.evaluate.results import BoxTally, Reply, Result, Summary, Tally, summarise, weighed
from lfm2vl_edge.evaluate.rows import Row, read_rows
from lfm2vl_edge.evaluate.run import MAX_TOKENS, evaluate
from lfm2vl_edge.evaluate.score import Score, iou, mean_iou, normalised, score

__all__ = [
    "MAX_TOKENS",
    "Bin",
    "BoxTally",
    "ChoiceTally",
    "Fit",
    "Reply",
    "Result",
    "Row",
    "Score",
    "Summary",
    "Tally",
    "Weighed",
    "draw_reliability",
    "evaluate",
    "fit_choices",
    "iou",
    "mean_iou",
    "normalised",
    "read_rows",
    "score",
    "summarise",
    "weighed",
]
