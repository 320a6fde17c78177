"""An OpenAI-compatible server on the scheduler; needs the extra `[server]`, and imports everything but the cli.

`app.py` has the routes, `answering.py` what every answer goes through, `chat.py` and `responses.py` its two forms;
`fields.py` and `images.py` read requests, `guard.py` refuses what nobody should send, `running.py` listens.
"""
