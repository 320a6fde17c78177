"""Many requests on one engine; imports what answers one request, and nothing above it.

    with Model.open() as model, Scheduler(model, parallel=4) as scheduler:
        streams = [scheduler.submit([user_message("photo.jpg", question)]) for question in questions]
        for stream in streams:
            print("".join(chunk.text for chunk in stream))

One thread owns the engine. Views are encoded one by one between the steps of running answers, and one native call
decodes a token of every running answer.
"""

from lfm2vl_edge.scheduler.scheduler import Scheduler
from lfm2vl_edge.scheduler.stream import Stream

__all__ = ["Scheduler", "Stream"]
