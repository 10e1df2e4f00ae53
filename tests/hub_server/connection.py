"""One connection: plain HTTP, and who is on the other side."""

import json
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

from hub_server.content import CHUNK, Repo
from hub_server.state import Drop, Hub, Refusal, Request


class Connection(BaseHTTPRequestHandler):
    """Reads requests, answers them through `dispatch`, and keeps a record."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def answer(self) -> None:
        parts = urlsplit(self.path)
        self.route, self.query = parts.path, parse_qs(parts.query)
        self.status = 0
        try:
            self.hub.on_request(self.command, self.path)
            self.dispatch()
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self.close_connection = True  # what it still has to send was not read
            self.send_json({"error": refusal.message}, refusal.status, headers | {"Connection": "close"})
        except Drop:
            self.break_off(reset=True)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            headers = {name.lower(): value for name, value in self.headers.items()}
            with self.hub.lock:
                self.hub.requests.append(Request(self.command, self.path, headers, self.status))

    def dispatch(self) -> None:
        raise NotImplementedError

    # Who asks, and may they

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def user(self) -> str | None:
        """The user of the token, None without one."""
        if self.headers.get("Authorization") is None:
            return None
        user = self.hub.users.get(self.token)
        if user is None:
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        return user

    def repo(self, kind: str, repo_id: str) -> Repo:
        user = self.user()
        repo = self.hub.repos.get((kind, repo_id))
        if repo is None or (repo.private and user != repo_id.split("/")[0]):
            if user is None:
                raise Refusal(401, "RepoNotFound", "Invalid username or password.")
            raise Refusal(404, "RepoNotFound", "Repository not found")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> str:
        sha = repo.resolve(revision)
        if sha is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def pass_gate(self, repo: Repo) -> None:
        user = self.user()
        if repo.gated and user not in repo.admitted:
            kind = "dataset" if repo.kind == "datasets" else "model"
            raise Refusal(
                401 if user is None else 403, "GatedRepo",
                f"Access to {kind} {repo.id} is restricted. You must have access to it and be authenticated to access it.",
            )  # fmt: skip

    def writable(self, kind: str, repo_id: str, branch: str | None = None) -> Repo:
        repo = self.repo(kind, repo_id)
        if self.user() != repo_id.split("/")[0] or self.token in self.hub.readers:
            raise Refusal(403, None, "You don't have the rights to write to this repo")
        if branch in repo.protected:
            raise Refusal(403, None, f"Branch {branch} is protected")
        return repo

    # Plain HTTP

    def body_pieces(self) -> Iterator[bytes]:
        """What the client sends, as it arrives."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left and (piece := self.rfile.read1(min(CHUNK, left))):
            left -= len(piece)
            yield piece
        if left:
            raise ConnectionResetError("the client left in the middle")

    def read_body(self) -> bytes:
        return b"".join(self.body_pieces())

    def send_json(self, data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send(status, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        if self.hub.loses(self.command, self.path):
            raise Drop
        self.status = status
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def break_off(self, reset: bool) -> None:
        """End the connection in the middle of an answer, as a router that dies does, or with a reset."""
        self.wfile.flush()
        self.close_connection = True
        if reset:
            time.sleep(0.05)  # what was sent arrives before the reset that would discard it
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
