"""A small Hub of the tests' own: an HTTP server on loopback that speaks as much of the Hub's API as the real clients use.

Models and datasets with branches, private and gated repos, tokens; large files through a redirect to another host name, as
the Hub's LFS storage is, with ranges, and connections that break in the middle; creating repos, uploading, committing; and
Xet, whose storage is a local folder that the real `hf_xet` reads and writes itself.

Every answer carries the headers and error codes of the real one. `requests` is what arrived, for tests to look at.
"""

import base64
import hashlib
import io
import json
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = 512 << 10  # files from this size on are LFS files, whatever their name
LARGE_NAMES = re.compile(r"\.(safetensors|bin|parquet|model)$")
CHUNK = 1 << 20
PACE = 0.05  # seconds per chunk on a slow line

Content = bytes | Path  # a file's content; a path is read piece by piece


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    content: Content
    size: int
    sha256: str
    oid: str  # git's own hash of the file, or of its LFS pointer
    large: bool
    xet_hash: str | None = None

    @classmethod
    def of(cls, name: str, content: Content) -> "Blob":
        sha256, sha1 = hashlib.sha256(), hashlib.sha1()
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        sha1.update(f"blob {size}\0".encode())
        for piece in pieces(content):
            sha256.update(piece)
            sha1.update(piece)
        large = size >= LARGE or LARGE_NAMES.search(name) is not None
        return cls(content, size, sha256.hexdigest(), sha1.hexdigest(), large)


def pieces(content: Content, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Bytes start … end of a file's content, piece by piece."""
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        file.seek(start)
        left = sys.maxsize if end is None else end - start
        while left and (piece := file.read(min(CHUNK, left))):
            left -= len(piece)
            yield piece


def damaged(content: bytes) -> bytes:
    """As long, but different in one bit."""
    return content[:-1] + bytes([content[-1] ^ 1])


@dataclass
class Repo:
    """A repo: branches point to commits, a commit is its files."""

    kind: str  # "models" or "datasets"
    id: str
    private: bool = False
    gated: bool = False
    admitted: set[str] = field(default_factory=set)  # users who accepted the licence
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, Blob], message: str = "", branch: str = "main") -> str:
        listing = sorted((name, blob.sha256) for name, blob in files.items())
        sha = hashlib.sha1(json.dumps([self.kind, self.id, len(self.commits), listing]).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        return sha if sha in self.commits else None

    @property
    def head(self) -> dict[str, Blob]:
        return self.commits[self.branches["main"]]


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]
    status: int

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


class Refusal(Exception):
    """An answer that is an error: status, the Hub's error code, its message."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class HubServer:
    """The server. `with HubServer(folder).running() as hub:` then `hub.url` is what HF_ENDPOINT must be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.users: dict[str, str] = {}  # token -> user
        self.readers: set[str] = set()  # tokens that may only read
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.uploads: dict[str, bytes] = {}  # sha256 -> content, of LFS uploads
        self.cuts: dict[str, list[tuple[int, bool]]] = {}  # file name -> bytes after which to cut, and whether with a reset
        self.slow: set[str] = set()  # names of files that arrive over a slow line
        self.corrupt: set[str] = set()  # names of files that arrive, on either side, with a bit changed
        self.xet = False  # whether new large files go through Xet
        self.lock = threading.Lock()
        self.stopping = threading.Event()

    @contextmanager
    def running(self) -> Iterator["HubServer"]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        server.daemon_threads = True
        server.block_on_close = False
        self.port = server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.storage_url = f"http://localhost:{self.port}"  # another host name: tokens must not be sent there
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.stopping.set()
            server.shutdown()
            server.server_close()
            thread.join()

    def add(self, repo_id: str, files: Mapping[str, Content | str], *, kind: str = "models", **settings: Any) -> Repo:
        """Make a repo with one commit on main."""
        repo = Repo(kind, repo_id, **settings)
        repo.commit({n: Blob.of(n, c.encode() if isinstance(c, str) else c) for n, c in files.items()})
        self.repos[kind, repo_id] = repo
        return repo

    def asked(self, method: str, part: str) -> list[Request]:
        """The requests of a method whose path contains `part`."""
        return [request for request in self.requests if request.method == method and part in request.path]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def answer(self) -> None:
        parts = urlsplit(self.path)
        self.route, self.query = unquote(parts.path), parse_qs(parts.query)
        self.status = 0
        try:
            self.dispatch()
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self.send_json({"error": refusal.message}, refusal.status, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            headers = {name.lower(): value for name, value in self.headers.items()}
            with self.hub.lock:
                self.hub.requests.append(Request(self.command, self.path, headers, self.status))

    def dispatch(self) -> None:
        repo = r"(models|datasets)/([\w.-]+/[\w.-]+)"
        for pattern, handle in (
            (r"/storage/(\w+)/(.+)", self.get_stored),
            (r"/upload/(\w+)", self.put_upload),
            (r"/verify", self.verify_upload),
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", self.validate_yaml),
            (rf"/api/{repo}/tree/([^/]+)(?:/(.*))?", self.tree),
            (rf"/api/{repo}/paths-info/([^/]+)", self.paths_info),
            (rf"/api/{repo}/refs", self.refs),
            (rf"/api/{repo}/auth-check", self.auth_check),
            (rf"/api/{repo}/preupload/([^/]+)", self.preupload),
            (rf"/api/{repo}/commit/([^/]+)", self.commit),
            (rf"/api/{repo}/xet-(read|write)-token/([^/]+)", self.xet_token),
            (rf"/api/{repo}(?:/revision/(.+))?", self.info),
            (r"/(?:(datasets)/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", self.resolve),
            (r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", self.lfs_batch),
        ):
            if (match := re.fullmatch(pattern, self.route)) is not None:
                handle(*match.groups())
                return
        self.read_body()
        raise Refusal(404, None, f"no such route: {self.route}")

    # Who asks, and may they

    def user(self) -> str | None:
        """The user of the token, None without one."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.users.get(header.removeprefix("Bearer "))
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

    def writable(self, kind: str, repo_id: str) -> Repo:
        repo = self.repo(kind, repo_id)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.user() != repo_id.split("/")[0] or token in self.hub.readers:
            raise Refusal(403, None, "You don't have the rights to create a model under this namespace")
        return repo

    # Reading

    def info(self, kind: str, repo_id: str, revision: str | None) -> None:
        repo = self.repo(kind, repo_id)
        sha = self.commit_of(repo, revision or "main")
        siblings = []
        for name, blob in repo.commits[sha].items():
            entry: dict[str, Any] = {"rfilename": name}
            if "blobs" in self.query:
                entry |= {"size": blob.size, "blobId": blob.oid}
                if blob.large:
                    entry["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": 130}
            siblings.append(entry)
        gated = "manual" if repo.gated else False
        self.send_json(
            {"_id": "0", "id": repo.id, "sha": sha, "private": repo.private, "gated": gated, "siblings": siblings, "tags": []}
        )

    def entry(self, name: str, blob: Blob) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": blob.size, "oid": blob.oid}
        if blob.large:
            entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
        if blob.xet_hash:
            entry["xetHash"] = blob.xet_hash
        return entry

    def entries(self, files: dict[str, Blob], folder: str, recursive: bool) -> list[dict[str, Any]]:
        """What a folder of a commit holds: files, and folders."""
        prefix = folder.strip("/") + "/" if folder.strip("/") else ""
        found, folders = [], set()
        for name, blob in files.items():
            if not name.startswith(prefix):
                continue
            rest = name[len(prefix) :].split("/")
            for depth in range(1, len(rest)):
                folders.add(prefix + "/".join(rest[:depth]))
            if recursive or len(rest) == 1:
                found.append(self.entry(name, blob))
        inner = [f for f in sorted(folders) if recursive or "/" not in f[len(prefix) :]]
        return found + [{"type": "directory", "path": f, "size": 0, "oid": hashlib.sha1(f.encode()).hexdigest()} for f in inner]

    def tree(self, kind: str, repo_id: str, revision: str, folder: str | None) -> None:
        repo = self.repo(kind, repo_id)
        files = repo.commits[self.commit_of(repo, revision)]
        entries = self.entries(files, folder or "", self.query.get("recursive", [""])[0].lower() == "true")
        if not entries and folder:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
        self.send_json(entries)

    def paths_info(self, kind: str, repo_id: str, revision: str) -> None:
        body = self.read_body()
        asked = parse_qs(body.decode())["paths"] if b"paths=" in body[:6] else json.loads(body)["paths"]
        repo = self.repo(kind, repo_id)
        files = repo.commits[self.commit_of(repo, revision)]
        everything = self.entries(files, "", recursive=True)
        self.send_json([entry for entry in everything if entry["path"] in asked])

    def refs(self, kind: str, repo_id: str) -> None:
        repo = self.repo(kind, repo_id)

        def listed(refs: dict[str, str], folder: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": sha} for n, sha in refs.items()]

        self.send_json({"branches": listed(repo.branches, "heads"), "tags": listed(repo.tags, "tags"), "converts": []})

    def auth_check(self, kind: str, repo_id: str) -> None:
        self.pass_gate(self.repo(kind, repo_id))
        self.send_json({})

    def resolve(self, prefix: str | None, repo_id: str, revision: str, name: str) -> None:
        repo = self.repo("datasets" if prefix else "models", repo_id)
        sha = self.commit_of(repo, revision)
        self.pass_gate(repo)
        blob = repo.commits[sha].get(name)
        if blob is None:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if not blob.large:
            self.send_content(blob, name, headers | {"ETag": f'"{blob.oid}"'})
            return
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        headers |= {"Location": f"{self.hub.storage_url}/storage/{blob.sha256}/{name}?signature=secret"}
        if blob.xet_hash:
            refresh = f"{self.hub.url}/api/{repo.kind}/{repo_id}/xet-read-token/{sha}"
            headers |= {"X-Xet-Hash": blob.xet_hash, "X-Xet-Refresh-Route": refresh}
        self.send(302, b"", headers)

    def get_stored(self, sha256: str, name: str) -> None:
        """The storage behind the redirect: a signed address, no token."""
        if "Authorization" in self.headers:
            raise Refusal(400, None, "a token was sent to the storage")
        for repo in self.hub.repos.values():
            for files in repo.commits.values():
                for blob in files.values():
                    if blob.sha256 == sha256:
                        self.send_content(blob, name, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})
                        return
        raise Refusal(404, None, "no such object")

    def send_content(self, blob: Blob, name: str, headers: dict[str, str]) -> None:
        """A file, or the range of it that is asked for, broken where the test says so."""
        start, end, status = 0, blob.size, 200
        if (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) is not None:
            start, end, status = int(asked[1]), min(int(asked[2] or blob.size - 1) + 1, blob.size), 206
            headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{blob.size}"}
        self.status = status
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(end - start)}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut, reset = self.next_cut(name)
        sent = 0
        for piece in pieces(blob.content, start, end):
            if name in self.hub.corrupt:
                piece = damaged(piece)
            if cut is not None and sent + len(piece) > cut:
                self.wfile.write(piece[: cut - sent])
                self.break_off(reset)
                return
            self.wfile.write(piece)
            sent += len(piece)
            if name in self.hub.slow:
                self.hub.stopping.wait(PACE)

    def next_cut(self, name: str) -> tuple[int | None, bool]:
        with self.hub.lock:
            cuts = self.hub.cuts.get(name)
            return cuts.pop(0) if cuts else (None, False)

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

    # Writing

    def create(self) -> None:
        body = json.loads(self.read_body())
        user = self.user()
        if user is None:
            raise Refusal(401, None, "Invalid username or password.")
        owner = body.get("organization") or user
        repo_id = f"{owner}/{body['name']}"
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if owner != user or token in self.hub.readers:
            raise Refusal(403, None, f"You don't have the rights to create a model under the namespace {owner!r}")
        if ("models", repo_id) in self.hub.repos:
            self.send_json({"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"}, 409)
            return
        self.hub.add(repo_id, {".gitattributes": "*.safetensors filter=lfs\n"}, private=body.get("visibility") == "private")
        self.send_json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": "0"})

    def validate_yaml(self) -> None:
        content = json.loads(self.read_body())["content"]
        front = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        fields = yaml.safe_load(front[1]) if front else None
        errors = [] if isinstance(fields, dict) else [{"message": "no metadata"}]
        self.send_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, kind: str, repo_id: str, revision: str) -> None:
        body = json.loads(self.read_body())
        head = self.writable(kind, repo_id).head
        files = []
        for file in body["files"]:
            large = file["size"] >= LARGE or LARGE_NAMES.search(file["path"]) is not None
            old = head.get(file["path"])
            oid = None if old is None else old.sha256 if old.large else old.oid
            files.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
        self.send_json({"files": files})

    def lfs_batch(self, repo_id: str) -> None:
        body = json.loads(self.read_body())
        self.writable("models", repo_id)
        objects = []
        for item in body["objects"]:
            upload = {"href": f"{self.hub.storage_url}/upload/{item['oid']}?signature=secret"}
            verify = {"href": f"{self.hub.url}/verify"}
            objects.append({**item, "authenticated": True, "actions": {"upload": upload, "verify": verify}})
        self.send_json({"transfer": "basic", "objects": objects})

    def put_upload(self, sha256: str) -> None:
        body = self.read_body()
        if "Authorization" in self.headers:
            raise Refusal(400, None, "a token was sent to the storage")
        if hashlib.sha256(body).hexdigest() != sha256:
            raise Refusal(400, None, "the content is not what was announced")
        self.hub.uploads[sha256] = body
        self.send(200, b"", {})

    def verify_upload(self) -> None:
        body = json.loads(self.read_body())
        if len(self.hub.uploads.get(body["oid"], b"")) != body["size"]:
            raise Refusal(404, None, "object not found")
        self.send_json({})

    def commit(self, kind: str, repo_id: str, branch: str) -> None:
        lines = [json.loads(line) for line in self.read_body().splitlines()]
        repo = self.writable(kind, repo_id)
        files = dict(repo.head)
        message = ""
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = Blob.of(value["path"], base64.b64decode(value["content"]))
                case "lfsFile":
                    content = self.hub.uploads.get(value["oid"], b"")
                    if not content and not self.hub.xet:
                        raise Refusal(400, None, f"no content was uploaded for {value['path']}")
                    files[value["path"]] = Blob(content, value["size"], value["oid"], "0" * 40, large=True)
                case "deletedFile":
                    del files[value["path"]]
        for name in self.hub.corrupt & set(files):
            files[name] = Blob.of(name, damaged(b"".join(pieces(files[name].content))))
        sha = repo.commit(files, message, branch)
        self.send_json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"})

    def xet_token(self, kind: str, repo_id: str, access: str, revision: str) -> None:
        if access == "write":
            self.writable(kind, repo_id)
        else:
            self.pass_gate(self.repo(kind, repo_id))
        cas, expiration = f"local://{self.hub.folder / 'xet'}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": cas, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expiration)}
        self.send_json({"casUrl": cas, "accessToken": "xet", "exp": expiration}, headers=headers)

    # Plain HTTP

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send_json(self, data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send(status, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.status = status
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
