"""A small Hugging Face hub on a loopback address: enough of its HTTP interface for snapshot_download."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


def commit_of(*repo: str) -> str:
    return hashlib.sha1(repr(repo).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        hub = self.server.hub
        path = unquote(urlsplit(self.path).path).lstrip("/")
        hub["requests"].append((self.command, path, self.headers.get("Authorization")))
        if hub["token"] and self.headers.get("Authorization") != f"Bearer {hub['token']}":
            return self.reply(401, b"{}", X_Error_Code="GatedRepo", X_Error_Message="Access to this repo is restricted")
        for (kind, name, revision), folder in hub["repos"].items():
            commit = commit_of(kind, name, revision)
            api, files = f"api/{kind}s/{name}", f"{name}/resolve" if kind == "model" else f"{kind}s/{name}/resolve"
            if path.startswith(f"{api}/revision/") and path.removeprefix(f"{api}/revision/") == revision:
                siblings = [{"rfilename": str(p.relative_to(folder))} for p in sorted(folder.rglob("*")) if p.is_file()]
                info = {"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
                return self.reply(200, json.dumps(info).encode(), Content_Type="application/json")
            if path in (f"{api}/tree/{revision}", f"{api}/tree/{commit}"):
                tree = [
                    {"type": "file", "path": str(p.relative_to(folder)), "size": p.stat().st_size, "oid": commit}
                    for p in sorted(folder.rglob("*"))
                    if p.is_file()
                ]
                return self.reply(200, json.dumps(tree).encode(), Content_Type="application/json")
            for prefix in (f"{files}/{revision}/", f"{files}/{commit}/"):
                if path.startswith(prefix) and (folder / path.removeprefix(prefix)).is_file():
                    body = (folder / path.removeprefix(prefix)).read_bytes()
                    tag = f'"{hashlib.sha1(body).hexdigest()}"'
                    return self.reply(200, body, ETag=tag, X_Repo_Commit=commit)
        return self.reply(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    do_HEAD = do_GET


@contextmanager
def serve(repos: dict, cache: Path, token: str | None = None):
    """Serve `repos`, {(repo_type, name, revision): folder}; yields a child's environment and the list of requests."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = {"repos": repos, "token": token, "requests": []}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(cache)}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    try:
        yield environment, server.hub["requests"]
    finally:
        server.shutdown()
        thread.join()


def run_python(code, argument, environment):
    command = [sys.executable, "-c", code, argument]
    return subprocess.run(command, capture_output=True, text=True, env=environment)
