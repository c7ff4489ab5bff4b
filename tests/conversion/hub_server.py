"""A small Hub on loopback: the few addresses that huggingface_hub asks when it downloads a snapshot.

A repository is a folder. Its files are served under one commit, with the headers from which the client makes its cache.
"""

import contextlib
import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub:
    """Serves `repos` (id -> folder); those in `private` want the token. `requests` records what was asked, and how."""

    def __init__(self, repos, private=(), token="hf_secret"):
        self.repos = {name: Path(folder) for name, folder in repos.items()}
        self.private, self.token = set(private), token
        self.requests, self.connections = [], []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def commit(self, repo):
        return hashlib.sha1(repo.encode()).hexdigest()

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
