"""What a client that publishes asks for: repos, branches, uploads, commits, tags.

Large files go to the storage first, in one request each (LFS's `basic` transfer) or in parts, and are then named in a commit by
their SHA-256. What the storage has is not asked for again. With Xet the client writes them into a folder by itself.
"""

import base64
import hashlib
import json
import re
import time
from math import ceil
from typing import Any

import yaml

from hub_server.connection import Connection
from hub_server.content import LARGE, LARGE_NAMES, Blob, damaged, pieces
from hub_server.state import Refusal


class Writing(Connection):
    # Repos, branches, tags

    def create(self) -> None:
        body = json.loads(self.read_body())
        user = self.user()
        if user is None:
            raise Refusal(401, None, "Invalid username or password.")
        owner = body.get("organization") or user
        repo_id = f"{owner}/{body['name']}"
        if owner != user or self.token in self.hub.readers:
            raise Refusal(403, None, f"You don't have the rights to create a model under the namespace {owner!r}")
        if ("models", repo_id) in self.hub.repos:
            self.send_json({"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"}, 409)
            return
        self.hub.add(repo_id, {".gitattributes": "*.safetensors filter=lfs\n"}, private=body.get("visibility") == "private")
        self.send_json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": "0"})

    def create_branch(self, kind: str, repo_id: str, branch: str) -> None:
        start = json.loads(self.read_body()).get("startingPoint", "main")
        repo = self.writable(kind, repo_id, branch)
        if branch in repo.branches:
            raise Refusal(409, None, f"Reference {branch} already exists")
        repo.branches[branch] = self.commit_of(repo, start)
        self.send_json({})

    def create_tag(self, kind: str, repo_id: str, revision: str) -> None:
        tag = json.loads(self.read_body())["tag"]
        repo = self.writable(kind, repo_id)
        if tag in repo.tags:
            raise Refusal(409, None, f"Tag reference exists already: {tag}")
        repo.tags[tag] = self.commit_of(repo, revision)
        self.send_json({})

    # Uploads

    def validate_yaml(self) -> None:
        content = json.loads(self.read_body())["content"]
        front = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        fields = yaml.safe_load(front[1]) if front else None
        errors = [] if isinstance(fields, dict) else [{"message": "no metadata"}]
        self.send_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, kind: str, repo_id: str, branch: str) -> None:
        body = json.loads(self.read_body())
        repo = self.writable(kind, repo_id, branch)
        self.commit_of(repo, branch)
        files = []
        for file in body["files"]:
            large = file["size"] >= LARGE or LARGE_NAMES.search(file["path"]) is not None
            old = repo.files(branch).get(file["path"])
            oid = None if old is None else old.sha256 if old.large else old.oid
            files.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
        self.send_json({"files": files})

    def lfs_batch(self, repo_id: str) -> None:
        body = json.loads(self.read_body())
        self.writable("models", repo_id)
        objects = []
        for item in body["objects"]:
            answer = {**item, "authenticated": True}
            if item["oid"] not in self.hub.uploads:
                verify = {"href": f"{self.hub.url}/verify"}
                answer["actions"] = {"upload": self.upload_action(item["oid"], item["size"]), "verify": verify}
            objects.append(answer)
        self.send_json({"transfer": "basic", "objects": objects})

    def upload_action(self, sha256: str, size: int) -> dict[str, Any]:
        storage, part = self.hub.storage_url, self.hub.part_size
        if part is None or size <= part:
            return {"href": f"{storage}/upload/{sha256}?signature=secret"}
        parts = {f"{n + 1}": f"{storage}/upload/{sha256}/{n + 1}?signature=secret" for n in range(ceil(size / part))}
        return {"href": f"{self.hub.url}/complete/{sha256}", "header": {"chunk_size": f"{part}", **parts}}

    def receive(self, sha256: str) -> bytes:
        """The body of an upload, counted."""
        if "Authorization" in self.headers:
            raise Refusal(400, None, "a token was sent to the storage")
        body = b""
        for piece in self.body_pieces():
            body += piece
            with self.hub.lock:
                self.hub.received[sha256] += len(piece)
            self.hub.on_receive(sha256, len(body))
        return body

    def put_upload(self, sha256: str) -> None:
        self.store(sha256, self.receive(sha256))
        self.send(200, b"", {})

    def put_part(self, sha256: str, number: str) -> None:
        self.hub.parts[sha256, int(number)] = self.receive(sha256)
        self.send(200, b"", {"ETag": f'"{number}"'})

    def complete(self, sha256: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(self.read_body())["parts"]]
        self.store(sha256, b"".join(self.hub.parts[sha256, number] for number in numbers))
        self.send_json({})

    def store(self, sha256: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != sha256:
            raise Refusal(400, None, "the content is not what was announced")
        self.hub.uploads[sha256] = content

    def verify_upload(self) -> None:
        body = json.loads(self.read_body())
        if len(self.hub.uploads.get(body["oid"], b"")) != body["size"]:
            raise Refusal(404, None, "object not found")
        self.send_json({})

    def xet_token(self, kind: str, repo_id: str, access: str, revision: str) -> None:
        if access == "write":
            self.writable(kind, repo_id, revision)
        else:
            self.pass_gate(self.repo(kind, repo_id))
        cas, expiration = f"local://{self.hub.folder / 'xet'}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": cas, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expiration)}
        self.send_json({"casUrl": cas, "accessToken": "xet", "exp": expiration}, headers=headers)

    # The commit

    def commit(self, kind: str, repo_id: str, branch: str) -> None:
        lines = [json.loads(line) for line in self.read_body().splitlines()]
        repo = self.writable(kind, repo_id, branch)
        files = dict(repo.files(branch))
        message = ""
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    message = value["summary"]
                    if value.get("parentCommit", repo.branches.get(branch)) != repo.branches.get(branch):
                        raise Refusal(412, None, "A commit has happened since. Please refresh and try again.")
                case "file":
                    files[value["path"]] = Blob.of(value["path"], base64.b64decode(value["content"]))
                case "lfsFile":
                    files[value["path"]] = self.uploaded(value["path"], value["oid"], value["size"])
                case "deletedFile":
                    if value["path"] not in files:
                        raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
                    del files[value["path"]]
        for name in self.hub.corrupt & set(files):
            files[name] = Blob.of(name, damaged(b"".join(pieces(files[name].content))))
        sha = repo.commit(files, message, branch)
        self.send_json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"})

    def uploaded(self, name: str, sha256: str, size: int) -> Blob:
        content = self.hub.uploads.get(sha256, b"")
        if not content and not self.hub.xet:
            raise Refusal(400, None, f"no content was uploaded for {name}")
        return Blob(content, size, sha256, "0" * 40, large=True, xet_hash=self.hub.xet_hashes.get(sha256))
