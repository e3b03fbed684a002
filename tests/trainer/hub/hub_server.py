"""A server on a real socket with the part of the Hugging Face Hub's HTTP API that uploads use.

The client is the real huggingface_hub. Large files are those in safetensors, sent by the LFS protocol, not by Xet.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_the_secret_of_this_test"


@dataclass
class Repository:
    """A repository on the server.

    Attributes:
        files: content of the newest commit, keyed by path.
        commits: messages of all commits.
        tags: commit ids, keyed by tag.
    """

    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})
    commits: list[str] = field(default_factory=lambda: ["initial commit"])
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        """Id of the newest commit."""
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


Response = tuple[int, Any]


@dataclass
class HubServer:
    """State of the server.

    Attributes:
        objects: uploaded large files, keyed by SHA-256.
        requests: method and path of each request, in order.
        before_commit: called before a commit is checked.
        knows_visibility: whether new repositories can be private.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    before_commit: Callable[[], None] = lambda: None
    knows_visibility: bool = True
    url: str = ""

    def respond(self, method: str, path: str, body: bytes, token: str | None) -> Response:
        """Return the status and the JSON body of the response to one request."""
        self.requests.append(f"{method} {path}")
        if method == "PUT":  # the URL itself is the permission, as on S3
            oid = path.removeprefix("/lfs/")
            self.objects[oid] = body
            return (200, {}) if hashlib.sha256(body).hexdigest() == oid else (400, {"error": "wrong hash"})
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/validate-yaml":
            text = json.loads(body)["content"]
            return (200, {"errors": [], "warnings": []}) if text.startswith("---\n") else (400, {"errors": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if named := re.fullmatch(r"/(\S+/\S+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        named = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)(?:/(\S+))?)?", path)
        repository = self.repositories.get(named[1]) if named else None
        if named is None or repository is None:
            return 404, {"error": "Repository not found"}
        return self._respond_for(named[1], repository, method, named[2], named[3], body)

    def _respond_for(
        self, name: str, repository: Repository, method: str, action: str | None, rest: str | None, body: bytes
    ) -> Response:
        match method, action:
            case "GET", None:
                siblings = [{"rfilename": path} for path in repository.files]
                return 200, {"id": name, "sha": repository.head, "private": repository.private, "siblings": siblings}
            case "GET", "refs":
                tags = [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": c} for t, c in repository.tags.items()]
                main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.head}
                return 200, {"branches": [main], "converts": [], "tags": tags}
            case "POST", "preupload":
                files = [file["path"] for file in json.loads(body)["files"]]
                modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in files}
                return 200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
            case "POST", "commit":
                return self._commit(name, repository, [json.loads(line) for line in body.splitlines()])
            case "POST", "tag":
                repository.tags[json.loads(body)["tag"]] = rest or ""
                return 200, {}
            case "DELETE", "tag":
                del repository.tags[rest or ""]
                return 200, {}
        return 404, {"error": "no such path"}

    def _create(self, wanted: dict[str, Any]) -> Response:
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] == "closed":
            return 403, {"error": "You don't have the rights to create a model under the namespace 'closed'"}
        self.repositories[name] = Repository(self.knows_visibility and wanted["visibility"] == "private")
        return 200, {"url": f"{self.url}/{name}", "name": name}

    def _batch(self, wanted: dict[str, Any]) -> Response:
        objects = []
        for item in wanted["objects"]:
            upload = {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}
            objects.append(item if item["oid"] in self.objects else item | {"actions": upload})
        return 200, {"transfer": "basic", "objects": objects}

    def _commit(self, name: str, repository: Repository, lines: list[dict[str, Any]]) -> Response:
        self.before_commit()
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repository.head):
            return 412, {"error": "the branch has moved"}
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    repository.files[value["path"]] = self.objects[value["oid"]]
                case "deletedFile":
                    del repository.files[value["path"]]
        repository.commits.append(header["summary"])
        url = f"{self.url}/{name}/commit/{repository.head}"
        return 200, {"commitUrl": url, "commitOid": repository.head, "commitMessage": header["summary"]}


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run a server while the context is active."""
    hub = HubServer()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"] or 0))
            status, content = hub.respond(
                self.command, self.path.partition("?")[0], body, self.headers["authorization"]
            )
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            if status == 404:
                self.send_header("x-error-code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_DELETE = _answer

        def log_message(self, *args: Any) -> None:
            """Suppress log output."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
