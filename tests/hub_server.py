# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face Hub on this machine: what huggingface_hub says to it over HTTP, and the rules it holds a card to.

Weights take the git-LFS path (batch, PUT, verify), all else goes into the commit itself. Xet is not spoken.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from hub_rules import card_errors

USER, TOKEN = "somebody", "hf_AdummyTokenThatOpensNothing"


class Repository:
    """One branch of files: path -> content, and whether it is stored as an LFS object."""

    def __init__(self, private: bool):
        self.private, self.read_only, self.gated = private, False, False
        self.tags: list[str] = []
        self.files: dict[str, tuple[bytes, bool]] = {".gitattributes": (b"*.safetensors filter=lfs\n", False)}
        self.commits: list[str] = []
        self.commit("initial commit")

    def commit(self, summary: str) -> str:
        self.commits.append(hashlib.sha1(f"{summary}{len(self.commits)}".encode()).hexdigest())
        return self.commits[-1]

    def oid(self, path: str) -> str:
        """As git or git-LFS name the content."""
        content, lfs = self.files[path]
        return hashlib.sha256(content).hexdigest() if lfs else git_sha1(content)


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer(ThreadingHTTPServer):
    """`with HubServer() as hub:` serves at `hub.url`, remembers every request, and can be told to die in an upload."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage_url = f"http://localhost:{self.server_port}"  # another host, to which no token is sent
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS: sha256 -> content
        self.requests: list[str] = []
        self.dies_in_upload = False

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self) -> None:
        """Close the socket: from now on connections are refused."""
        self.shutdown()
        self.server_close()

    def publish(self, name: str, folder: Path, owner: str = USER) -> None:
        """A repository of this user, or of another, with the files of `folder`, as if it had been pushed."""
        repository = self.repositories[f"{owner}/{name}"] = Repository(private=False)
        for path in filter(Path.is_file, folder.rglob("*")):
            lfs = path.suffix == ".safetensors"
            repository.files[str(path.relative_to(folder))] = (path.read_bytes(), lfs)
            self.objects[hashlib.sha256(path.read_bytes()).hexdigest()] = path.read_bytes()

    def environment(self, home, token: str | None = TOKEN) -> dict[str, str]:
        """Of a child process that takes this server for the Hub and has its caches in `home`."""
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return {**variables, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": token or ""}

    def handle_error(self, request, client_address):
        with contextlib.suppress(ConnectionError):  # a client that has gone; anything else is shown
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One request; `ROUTES` at the end says which method answers it."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_):
        pass

    def respond(self):
        self.url = urlsplit(unquote(self.path))
        self.server.requests.append(f"{self.command} {self.url.path}")
        length = int(self.headers.get("Content-Length", 0))
        if self.command == "PUT" and self.server.dies_in_upload:  # half of the body read, no answer, nobody listening
            self.rfile.read(length // 2)
            self.server.stop()
            self.close_connection = True
            return
        self.body = self.rfile.read(length)
        for command, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, self.url.path)
            if match and self.command in command:
                answer(self, *match.groups())
                return
        self.reply(404, {"error": "no such route"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = respond

    def reply(self, status: int, content: dict | list | bytes, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def allowed(self) -> bool:
        """Whether the token is right; answers the request if it is not."""
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.reply(401, {"error": "Invalid username or password."})
        return False

    def repository(self, repo_id: str, write: bool = False) -> Repository | None:
        """The repository, if it may be read or written; answers the request if not."""
        repository = self.server.repositories.get(repo_id)
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not authorized):
            self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif write and not (authorized and not repository.read_only):
            self.reply(403 if authorized else 401, {"error": "You may not write here."})
        else:
            return repository
        return None

    def whoami(self):
        if self.allowed():
            self.reply(200, {"type": "user", "name": USER, "auth": {"accessToken": {"role": "write"}}})

    def create(self):
        if not self.allowed():
            return
        wanted = json.loads(self.body)
        repo_id = f"{wanted['organization'] or USER}/{wanted['name']}"
        reply = {"url": f"{self.server.url}/{repo_id}", "name": repo_id}
        if repo_id in self.server.repositories:
            self.reply(409, {**reply, "error": "You already created this model repo"})
        elif not repo_id.startswith(f"{USER}/"):
            self.reply(403, {"error": "You don't have the rights to create a model under this namespace"})
        else:
            self.server.repositories[repo_id] = Repository(
                wanted.get("visibility") == "private" or bool(wanted.get("private"))
            )
            self.reply(200, reply)

    def delete(self):
        wanted = json.loads(self.body)
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        if self.repository(repo_id, write=True):
            del self.server.repositories[repo_id]
            self.reply(200, {})

    def auth_check(self, repo_id, write):
        repository = self.repository(repo_id, write=bool(write))
        if repository and repository.gated:
            self.reply(403, {"error": "You have not accepted its terms."}, X_Error_Code="GatedRepo")
        elif repository:
            self.reply(200, {})

    def validate_yaml(self):
        errors = card_errors(json.loads(self.body)["content"])
        messages = [{"message": error} for error in errors]
        self.reply(400 if errors else 200, {"errors": messages, "warnings": []})

    def info(self, repo_id, _revision=None):
        if repository := self.repository(repo_id):
            siblings = [{"rfilename": path} for path in repository.files]
            facts = {"id": repo_id, "sha": repository.commits[-1], "private": repository.private}
            self.reply(200, {**facts, "siblings": siblings, "tags": repository.tags, "gated": repository.gated})

    def tree(self, repo_id, _revision):
        if repository := self.repository(repo_id):
            entries = []
            for path, (content, lfs) in repository.files.items():
                entry = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
                if lfs:
                    entry["lfs"] = {"oid": repository.oid(path), "size": len(content), "pointerSize": 130}
                entries.append(entry)
            self.reply(200, entries)

    def preupload(self, repo_id, _revision):
        if repository := self.repository(repo_id, write=True):
            files = []
            for wanted in json.loads(self.body)["files"]:
                path = wanted["path"]
                mode = "lfs" if path.endswith(".safetensors") else "regular"
                oid = {"oid": repository.oid(path)} if path in repository.files else {}
                files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
            self.reply(200, {"files": files})

    def lfs_batch(self, repo_id):
        if self.repository(repo_id, write=True):
            objects = json.loads(self.body)["objects"]
            for wanted in objects:
                if wanted["oid"] not in self.server.objects:  # others are here already
                    href = f"{self.server.storage_url}/lfs/{wanted['oid']}"
                    wanted["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            self.reply(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        whole = hashlib.sha256(self.body).hexdigest() == oid
        if whole:
            self.server.objects[oid] = self.body
        self.reply(200 if whole else 400, {})

    def lfs_verify(self, oid):
        there = len(self.server.objects.get(oid, b"")) == json.loads(self.body)["size"]
        self.reply(200 if there else 404, {})

    def lfs_get(self, oid):
        self.reply(200, self.server.objects[oid])

    def commit(self, repo_id, _revision):
        if repository := self.repository(repo_id, write=True):
            header, *entries = (json.loads(line) for line in self.body.splitlines())
            added = {}
            for entry in entries:
                value = entry["value"]
                if entry["key"] == "file":
                    added[value["path"]] = (base64.b64decode(value["content"]), False)
                else:
                    assert entry["key"] == "lfsFile", entry["key"]
                    added[value["path"]] = (self.server.objects[value["oid"]], True)
            repository.files |= added  # all or nothing
            oid = repository.commit(header["value"]["summary"])
            self.reply(
                200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}"}
            )

    def resolve(self, repo_id, revision, path):
        if not (repository := self.repository(repo_id)):
            return
        if revision not in ("main", *repository.commits):
            self.reply(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
            return
        if repository.gated:
            self.reply(403, {"error": "You have not accepted its terms."}, X_Error_Code="GatedRepo")
            return
        headers = {"X_Repo_Commit": repository.commits[-1]}
        if path not in repository.files:
            self.reply(404, {"error": "Entry not found"}, **headers, X_Error_Code="EntryNotFound")
            return
        content, lfs = repository.files[path]
        headers["ETag"] = f'"{repository.oid(path)}"'
        if lfs:  # redirected to where the objects are
            linked = {"X_Linked_Etag": headers["ETag"], "X_Linked_Size": str(len(content))}
            self.reply(302, b"", **headers, **linked, Location=f"{self.server.storage_url}/lfs/{repository.oid(path)}")
        else:
            self.reply(200, content, **headers)


NAME = r"([\w-]+/[\w.-]+?)"
ROUTES = (
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("DELETE", "/api/repos/delete", Handler.delete),
    ("GET", f"/api/models/{NAME}/auth-check(/write)?", Handler.auth_check),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)", Handler.tree),
    ("GET", f"/api/models/{NAME}/revision/([^/]+)", Handler.info),
    ("GET", f"/api/models/{NAME}", Handler.info),
    ("GET", "/api/(datasets/[^/]+/[^/]+)", Handler.info),
    ("POST", f"/api/models/{NAME}/preupload/([^/]+)", Handler.preupload),
    ("POST", f"/api/models/{NAME}/commit/([^/]+)", Handler.commit),
    ("POST", f"/{NAME}[.]git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(\w{64})", Handler.lfs_put),
    ("POST", r"/lfs/(\w{64})/verify", Handler.lfs_verify),
    ("GET", r"/lfs/(\w{64})", Handler.lfs_get),
    ("GET HEAD", f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
)
