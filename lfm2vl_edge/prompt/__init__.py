"""From messages to segments and token runs. May import engine, cache and image."""
