"""Questions about what changed in a camera, a video or a folder; imports what opens models, and nothing above it.

    source ─read→ Shot ─Reader→ Frame ─Gate.examine→ Change ─Gate.preprocess→ views ─ask→ Reply ─event→ outputs

`watcher.py` is the line itself. One thread reads the source, one asks, and each output has a thread of its own;
between them are queues of fixed length, and what does not fit into them is counted.
"""
