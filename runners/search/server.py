"""`--serve`: listens, answers, and stops when it is asked to."""

import os
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn

from common.config import load_section
from common.errors import UserError
from common.places import ROOT
from runners.search.searcher import Searcher
from runners.search.service import LOCAL, ServeConfig, Service, create_app
from utils.output import say

_LAST_SECONDS = 5  # that answers under way may still take when the server is asked to stop


class _Server(uvicorn.Server):
    """Ctrl-C and SIGTERM end it in order: no new requests, answers under way are finished."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """As uvicorn's, which raises the signal once more at the end; here the command ends well."""
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit and number == signal.SIGINT  # a second Ctrl-C does not wait
        self.should_exit = True


def serve(folder: Path, overrides: list[str], device: str) -> None:
    """Serves an index until Ctrl-C or SIGTERM.

    Args:
        folder: The index's folder.
        overrides: Entries `serve.key=value` and `search.key=value`.
        device: Where questions are encoded.

    Raises:
        UserError: If the index cannot be used, or the address is not to be had.
    """
    for_search = [entry for entry in overrides if not entry.startswith("serve.")]
    for_server = [entry for entry in overrides if entry.startswith("serve.")]
    config = load_section(ROOT / "configs/serve.yaml", "serve", ServeConfig, for_server)
    with _listening(config.host, config.port) as listener:
        service = Service(Searcher.open(folder, device=device, overrides=for_search), config)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        others = "" if config.host in LOCAL else "; it answers whoever reaches this machine"
        say(f"{folder} is served at http://{shown}:{port}/ (Ctrl-C ends it{others})")
        settings = uvicorn.Config(
            create_app(service),
            log_config=None,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=_LAST_SECONDS,
        )
        try:
            _Server(settings).run(sockets=[listener])
        finally:
            service.close()
    say("stopped")


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        number = error.errno or 0  # those of looking up a name are below 0, with words of their own
        why = os.strerror(number) if number > 0 else error.strerror
        raise UserError(
            f"serve.host={host} serve.port={port}: cannot listen there ({why}); "
            "choose another serve.port, or 0 for one that is free"
        ) from None
