"""What was computed once: embeddings and states, in memory and on disk, by fingerprint.

May import the engine's protocol, models and below.
"""
