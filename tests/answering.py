"""Programs that answer HTTP on a port, or at a socket, of this machine, for as long as a test asks them."""

import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Answer = tuple[int, bytes]  # a status, and what comes with it


@contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler], Answer], socket: Path | None = None) -> Iterator[str]:
    """A program that answers every GET. Yields its address.

    Args:
        socket: where it listens; None: at a port.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answer(self)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def address_string(self) -> str:
            return "a test"

        def log_message(self, format: str, *told: object) -> None:
            pass

    server: socketserver.BaseServer
    if socket is None:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        address = f"http://127.0.0.1:{server.server_port}"
    else:
        server = socketserver.ThreadingUnixStreamServer(str(socket), Handler)
        server.daemon_threads = True
        address = f"unix://{socket}"
    with server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05], daemon=True)
        thread.start()
        try:
            yield address
        finally:
            server.shutdown()
            thread.join()
            if socket is not None:
                socket.unlink()
