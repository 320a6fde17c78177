"""From messages to segments, and to the pieces that the engine decodes.

May import cache, the engine's protocol and below.
"""
