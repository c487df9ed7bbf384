"""Flags of `serve` beside model and guidance. Names, and those of environment variables, are
llama-server's where it has them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cmg_gguf.errors import CMGError

if TYPE_CHECKING:
    from cmg_gguf.evidence import EvidenceModel
    from cmg_gguf.guidance import Guidance
    from cmg_gguf.server.limits import Limits
    from cmg_gguf.server.running import Options

NO_LIMIT = -1

_reached = partial(typer.Option, rich_help_panel="Reached at")
_asked = partial(typer.Option, rich_help_panel="Answers")


@dataclass(frozen=True, kw_only=True)
class ServeFlags:
    """How a server is reached, by whom, and how much it takes."""

    host: Annotated[
        str,
        _reached(
            "--host",
            envvar="LLAMA_ARG_HOST",
            metavar="ADDRESS",
            help="Address to listen at; 0.0.0.0 = reached from other machines: then set --api-key.",
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int,
        _reached(
            "--port",
            envvar="LLAMA_ARG_PORT",
            min=0,
            max=65535,
            metavar="N",
            help="Port to listen at; 0 = any that is free.",
        ),
    ] = 8080
    unix_socket: Annotated[
        Path | None,
        _reached("--unix-socket", metavar="FILE", help="A UNIX socket instead of host and port."),
    ] = None
    api_key: Annotated[
        list[str] | None,
        _reached(
            "--api-key",
            envvar="LLAMA_API_KEY",
            metavar="KEY",
            help="A key that requests must bring; repeat it for several. Prompts that are kept are "
            "kept by key.",
        ),
    ] = None
    api_key_file: Annotated[
        Path | None,
        _reached("--api-key-file", metavar="FILE", help="More keys, one a line."),
    ] = None
    ssl_keyfile: Annotated[
        Path | None,
        _reached(
            "--ssl-keyfile",
            "--ssl-key-file",
            envvar="LLAMA_ARG_SSL_KEY_FILE",
            exists=True,
            dir_okay=False,
            metavar="FILE",
            help="Private key, for https.",
        ),
    ] = None
    ssl_certfile: Annotated[
        Path | None,
        _reached(
            "--ssl-certfile",
            "--ssl-cert-file",
            envvar="LLAMA_ARG_SSL_CERT_FILE",
            exists=True,
            dir_okay=False,
            metavar="FILE",
            help="Certificate, for https.",
        ),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        _reached(
            "--cors-origin",
            metavar="ORIGIN",
            help="A web page elsewhere that may read answers, as https://example.org; repeat it "
            "for several. Without it, none may.",
        ),
    ] = None
    server_name: Annotated[
        list[str] | None,
        _reached(
            "--server-name",
            metavar="NAME",
            help="Without keys: a name in a public domain by which the server is asked, as behind "
            "a proxy; repeat it for several. Its address and local names need none.",
        ),
    ] = None
    alias: Annotated[
        str | None,
        _reached(
            "--alias",
            "-a",
            envvar="LLAMA_ARG_ALIAS",
            metavar="NAME",
            help="The model's name for clients. Default: its file's.",
        ),
    ] = None
    parallel: Annotated[
        int | None,
        _asked(
            "--parallel",
            "-np",
            envvar="LLAMA_ARG_N_PARALLEL",
            min=1,
            max=64,
            metavar="N",
            help="Answers that are made at once; they share -c. Default: 4, on an accelerator 8.",
        ),
    ] = None
    queue: Annotated[
        int,
        _asked(
            "--queue",
            min=0,
            metavar="N",
            help="Answers that may wait beyond those; what comes then is refused (429).",
        ),
    ] = 32
    temp: Annotated[
        float,
        _asked(
            "--temp",
            min=0.0,
            max=100.0,
            metavar="X",
            help="Temperature of requests that name none; 0 = greedy.",
        ),
    ] = 0.8
    predict: Annotated[
        int,
        _asked(
            "--predict",
            "-n",
            min=NO_LIMIT,
            metavar="N",
            help="Most tokens of an answer, whatever a request says; -1 = until the context is "
            "full.",
        ),
    ] = NO_LIMIT
    drain: Annotated[
        float,
        _asked(
            "--drain",
            min=0.0,
            metavar="SECONDS",
            help="Told to end, how long the server lets answers under way go on.",
        ),
    ] = 30.0
    sleep_idle_seconds: Annotated[
        float | None,
        _asked(
            "--sleep-idle-seconds",
            min=1.0,
            metavar="SECONDS",
            help="Free the model when nobody has asked for so long; the next request loads it "
            "again. Default: never.",
        ),
    ] = None

    def options(self, guidance: Guidance, evidence: EvidenceModel) -> Options:
        """The same as the server takes it. evidence: weights. Raises BadParameter, CMGError."""
        from cmg_gguf.server.running import Options
        from cmg_gguf.server.service import Defaults

        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise typer.BadParameter(
                "https needs both", param_hint="'--ssl-keyfile' and '--ssl-certfile'"
            )
        return Options(
            host=self.host,
            port=self.port,
            unix_socket=self.unix_socket,
            ssl_key_file=self.ssl_keyfile,
            ssl_cert_file=self.ssl_certfile,
            keys=self._keys(),
            origins=tuple(self.cors_origin or ()),
            names=tuple(self.server_name or ()),
            n_waiting=self.queue,
            sleep_seconds=self.sleep_idle_seconds,
            limits=self._limits(),
            defaults=Defaults(guidance=guidance, evidence=evidence, temperature=self.temp),
        )

    def _limits(self) -> Limits:
        from cmg_gguf.server.limits import Limits

        if self.predict == 0:
            raise typer.BadParameter(
                "0 tokens are no answer; give 1 and up, or -1", param_hint="'--predict' / '-n'"
            )
        most = None if self.predict == NO_LIMIT else self.predict
        return Limits(max_tokens=most, drain_seconds=self.drain)

    def _keys(self) -> tuple[str, ...]:
        keys = [key.strip() for key in self.api_key or ()]
        if self.api_key_file is not None:
            try:
                lines = self.api_key_file.read_text("utf-8").splitlines()
            except (OSError, ValueError) as exc:
                raise CMGError(
                    f"the key file {self.api_key_file} cannot be read ({exc}); name one that is "
                    "there"
                ) from exc
            keys += [line.strip() for line in lines if line.strip()]
            if not keys:
                raise CMGError(f"the key file {self.api_key_file} has no key in it; write one")
        if not all(keys):
            raise typer.BadParameter("an empty key is none", param_hint="'--api-key'")
        return tuple(keys)
