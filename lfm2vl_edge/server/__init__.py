"""An OpenAI-compatible server on the scheduler; needs the extra `[server]`, and imports everything but the cli.

`app.py` has the routes, `chat.py` turns requests into answers, `fields.py` and `images.py` read them, `guard.py`
refuses what nobody should send, `running.py` listens.
"""
