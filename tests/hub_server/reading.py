"""What a client that reads asks for: what is there, and the files themselves."""

import hashlib
import json
import re
from typing import Any
from urllib.parse import parse_qs

from hub_server.connection import Connection
from hub_server.content import Blob, damaged, pieces
from hub_server.state import Refusal

PACE = 0.05  # seconds per chunk on a slow line


class Reading(Connection):
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
