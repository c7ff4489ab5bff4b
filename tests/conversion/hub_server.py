"""A small Hub on loopback: the few addresses that huggingface_hub asks when it downloads a snapshot or uploads files.

A repository is a folder. Its files are served under one commit, the last, with the headers from which the client makes
its cache. Repositories that are created get a folder in `new`.
"""

import base64
import contextlib
import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub:
    """Serves `repos` (id -> folder); private ones and writers need the token. `requests` records what was asked."""

    def __init__(self, repos, private=(), token="hf_secret", new=None):
        self.repos = {name: Path(folder) for name, folder in repos.items()}
        self.private, self.token, self.new = set(private), token, new
        self.pushes = dict.fromkeys(repos, 0)
        self.requests, self.connections = [], []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def commit(self, repo):
        return hashlib.sha1(f"{repo}{self.pushes[repo] or ''}".encode()).hexdigest()

    def create(self, repo):
        self.repos[repo] = Path(self.new, repo.replace("/", "--"))
        self.repos[repo].mkdir()
        self.pushes[repo] = 0

    def push(self, repo, files):
        for name, content in files.items():
            path = self.repos[repo] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self.pushes[repo] += 1

    def files(self, repo):
        folder = self.repos[repo]
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """Be unreachable from now on, for connections that are kept alive as well."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.hub.connections.append(self.connection)

    def do_GET(self):
        self.answer(with_body=True)

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path).strip("/")
        authorization = self.headers.get("Authorization")
        self.hub.requests.append((self.command, path, authorization))
        if path == "api/validate-yaml":
            return self.send_json({"warnings": [], "errors": []}, True)
        if authorization != f"Bearer {self.hub.token}":
            return self.fail(401, "Unauthorized", "Invalid credentials", True)
        if path == "api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in self.hub.repos:
                return self.fail(409, "Conflict", "You already created this model repo", True)
            self.hub.create(repo)
            return self.send_json({"url": f"{self.hub.address}/{repo}"}, True)
        repo, (action, revision) = "/".join(path.split("/")[2:4]), path.split("/")[4:]
        if action == "preupload":
            # nothing here is so large that it had to go another way than in the commit itself
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.send_json({"files": modes}, True)
        assert (action, revision) == ("commit", "main")
        operations = [json.loads(line) for line in body.splitlines()]
        files = [operation["value"] for operation in operations if operation["key"] == "file"]
        self.hub.push(repo, {file["path"]: base64.b64decode(file["content"]) for file in files})
        commit = self.hub.commit(repo)
        return self.send_json({"commitOid": commit, "commitUrl": f"{self.hub.address}/{repo}/commit/{commit}"}, True)

    def answer(self, with_body):
        path = unquote(urlsplit(self.path).path).strip("/")
        authorization = self.headers.get("Authorization")
        self.hub.requests.append((self.command, path, authorization))
        is_api = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        if repo not in self.hub.repos:
            return self.fail(401, "RepoNotFound", "Repository not found", with_body)
        if repo in self.hub.private and authorization != f"Bearer {self.hub.token}":
            return self.fail(401, "RepoNotFound", "Repository not found", with_body)
        commit = self.hub.commit(repo)
        if len(rest) > 1 and rest[1] not in ("main", "v1", commit):
            return self.fail(404, "RevisionNotFound", "Invalid rev id", with_body)
        if not is_api and rest[0] == "resolve":
            return self.send_blob(repo, "/".join(rest[2:]), commit, with_body)
        if is_api and (not rest or rest[0] == "revision"):
            siblings = [{"rfilename": name} for name in self.hub.files(repo)]
            return self.send_json({"id": repo, "sha": commit, "siblings": siblings, "private": False}, with_body)
        if is_api and rest[0] == "tree":
            entries = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _digest(path)}
                for name, path in self.hub.files(repo).items()
            ]
            return self.send_json(entries, with_body)
        return self.fail(404, "EntryNotFound", "Entry not found", with_body)

    def send_blob(self, repo, name, commit, with_body):
        path = self.hub.files(repo).get(name)
        if path is None:
            return self.fail(404, "EntryNotFound", "Entry not found", with_body)
        self.send_body(200, path.read_bytes(), {"ETag": f'"{_digest(path)}"', "X-Repo-Commit": commit}, with_body)

    def send_json(self, content, with_body):
        self.send_body(200, json.dumps(content).encode(), {"Content-Type": "application/json"}, with_body)

    def fail(self, status, code, message, with_body):
        self.send_body(status, b"", {"X-Error-Code": code, "X-Error-Message": message}, with_body)

    def send_body(self, status, body, headers, with_body):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format, *args):
        pass


def _digest(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()
