"""The server: which request goes where, and its thread."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from urllib.parse import unquote

from hub_server.reading import Reading
from hub_server.state import Hub, Refusal
from hub_server.writing import Writing


class Handler(Reading, Writing):
    def dispatch(self) -> None:
        repo = r"(models|datasets)/([\w.-]+/[\w.-]+)"
        for pattern, handle in (
            (r"/storage/(\w+)/(.+)", self.get_stored),
            (r"/upload/(\w+)", self.put_upload),
            (r"/upload/(\w+)/(\d+)", self.put_part),
            (r"/complete/(\w+)", self.complete),
            (r"/verify", self.verify_upload),
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", self.validate_yaml),
            (rf"/api/{repo}/tree/([^/]+)(?:/(.*))?", self.tree),
            (rf"/api/{repo}/paths-info/([^/]+)", self.paths_info),
            (rf"/api/{repo}/refs", self.refs),
            (rf"/api/{repo}/auth-check", self.auth_check),
            (rf"/api/{repo}/branch/([^/]+)", self.create_branch),
            (rf"/api/{repo}/tag/([^/]+)", self.create_tag),
            (rf"/api/{repo}/preupload/([^/]+)", self.preupload),
            (rf"/api/{repo}/commit/([^/]+)", self.commit),
            (rf"/api/{repo}/xet-(read|write)-token/([^/]+)", self.xet_token),
            (rf"/api/{repo}(?:/revision/(.+))?", self.info),
            (r"/(?:(datasets)/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", self.resolve),
            (r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", self.lfs_batch),
        ):
            if (match := re.fullmatch(pattern, self.route)) is not None:
                handle(*(group if group is None else unquote(group) for group in match.groups()))
                return
        self.read_body()
        raise Refusal(404, None, f"no such route: {self.route}")


class HubServer(Hub):
    """The server. `with HubServer(folder).running() as hub:` then `hub.url` is what HF_ENDPOINT must be."""

    @contextmanager
    def running(self) -> Iterator["HubServer"]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        server.daemon_threads = True
        server.block_on_close = False
        port = server.server_address[1]
        self.url, self.storage_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.stopping.set()
            server.shutdown()
            server.server_close()
            thread.join()
