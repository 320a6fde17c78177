"""Many rows through one model, so that nothing is lost; imports the scheduler and what it needs, and nothing above it.

```python
from lfm2vl_edge import Model
from lfm2vl_edge.batch import BatchOptions, run_batch

with Model.open("lfm2.5-vl-450m") as model:
    done = run_batch(model, ["scans/"], "answers.jsonl", BatchOptions(prompt="What is the title?"))
    print(done.done, done.errors)
```

The same call resumes after whatever ended an earlier one: see `run_batch`.
"""

from lfm2vl_edge.batch.run import Progress, run_batch
from lfm2vl_edge.batch.settings import BatchOptions

__all__ = ["BatchOptions", "Progress", "run_batch"]
