"""`cmg-gguf serve`: an OpenAI-compatible server on loopback."""

from __future__ import annotations

import json
import logging
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cmg_gguf.cli.asker import fetched, note_built_in
from cmg_gguf.cli.exits import load_library, manners
from cmg_gguf.cli.guidance_flags import GuidanceFlags
from cmg_gguf.cli.media_flags import MediaFlags
from cmg_gguf.cli.model_flags import ModelFlags
from cmg_gguf.cli.screen import Screen
from cmg_gguf.cli.serve_flags import ServeFlags
from cmg_gguf.errors import UnsupportedError

if TYPE_CHECKING:
    from cmg_gguf.server.running import Server

EXAMPLES = """\
Examples:

  cmg-gguf serve                               the built-in model, at http://127.0.0.1:8080

  cmg-gguf serve -m llava.gguf --mmproj mmproj.gguf --settings tuned/settings.json

  cmg-gguf serve -hf owner/repo:Q4_K_M --host 0.0.0.0 --api-key-file keys.txt

  cmg-gguf serve ... --no-guidance             plain answers, but where a request asks for others
"""


@manners()
def serve(
    *, server: ServeFlags, media: MediaFlags, guidance: GuidanceFlags, model: ModelFlags
) -> None:
    """Serve the model to OpenAI's clients, its answers guided.

    Where it is reached, and how to ask it, goes to standard error. It ends with Ctrl-C or SIGTERM,
    when the answers under way are done.
    """
    load_library()
    load_server()
    from cmg_gguf.server.running import Server
    from cmg_gguf.vlm import GuidedVLM

    model.check()
    own = model.own_settings
    options = replace(
        server.options(guidance.guidance(own), guidance.weights(own)),
        media=media.media(model.max_pixels),
        draws_scenes=model.built_in,
    )
    err = Screen(progress=not model.verbose)
    note_built_in(err, model, guidance.told(own))
    files = fetched(err, model)
    load = partial(GuidedVLM, *files, **model.options(), n_parallel=server.parallel)
    with err.waiting("load") as waiting:
        vlm = load(progress=waiting)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    name = server.alias or ("tiny-llava" if model.built_in else Path(files[0]).stem)
    running = Server(vlm, load, options, name=name)
    running.on_start = partial(_tell, err, running, server)
    # uvicorn raises the signal again when it has drained: that is the end that was asked for.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        running.run()
    except SystemExit as exc:  # uvicorn's, which has logged why
        raise UnsupportedError(
            f"the server cannot listen at {server.host}:{server.port}; name another --port"
        ) from exc


def load_server() -> None:
    """Imports what the server needs. Raises UnsupportedError where it is not installed."""
    try:
        import cmg_gguf.server.running  # noqa: F401
    except ImportError as exc:
        raise UnsupportedError(
            f"the server needs {exc.name}, which is not installed: pip install 'cmg-gguf[server]'"
        ) from exc


def _tell(err: Screen, server: Server, flags: ServeFlags) -> None:
    """Says where it is, and how to ask it."""
    address = server.address
    key = " -H 'Authorization: Bearer KEY'" if server.needs_key else ""
    socket = f" --unix-socket {flags.unix_socket}" if flags.unix_socket is not None else ""
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}]})
    err.aside(f"{server.service.name} is served at {address}/v1; its page is {address}/")
    err.aside(
        f"curl{socket} {address}/v1/chat/completions{key} -H 'Content-Type: application/json' "
        f"-d '{body}'"
    )
