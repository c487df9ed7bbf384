"""An OpenAI-compatible server over one `GuidedVLM`: what clients of such servers send, guided.

    service.py   one model: who may ask it when (queue.py), while it is loaded (lifetime.py)
    answer.py    an answer on an event loop
    app.py       the routes: chat.py (chat completions), responses.py, ollama.py, about.py,
                 metrics.py
    guard.py     keys, sizes and times of bodies (limits.py), ahead of every route; visitors.py:
                 no web pages of elsewhere
    extent.py    what is too long to be read
    media.py     which pictures a request may name: files.py below a folder, remote.py at a host
    failures.py  what is wrong, in the shape that the client knows
    running.py   uvicorn

Nothing here knows how an answer is made; nothing below knows HTTP.
"""
