"""A small Hugging Face Hub on 127.0.0.1: the file API that huggingface_hub reads and writes, with faults to order.

    GET  /api/models/<repo>/revision/<revision>?blobs=true     commit, files with sizes and hashes
    GET  /<repo>/resolve/<revision>/<path>                     small files; others redirect to /cdn/<sha256>
    GET  /cdn/<sha256>                                         with Range
    POST /api/repos/create, /api/models/<repo>/preupload|commit/<revision>, /<repo>.git/info/lfs/objects/batch
    PUT  /upload/<sha256>

Responses carry X-Repo-Commit, ETag, X-Linked-Etag and X-Linked-Size as the Hub's do.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub

from molora.hub.web import Web


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def _lower(headers):
    return {key.lower(): value for key, value in headers.items()}


@dataclass
class Fault:
    """What goes wrong on paths that contain `path`, for the next `times` requests."""

    path: str
    times: int = 10**9
    status: int | None = None
    headers: dict = field(default_factory=dict)
    redirect: str | None = None
    cut: int | None = None  # close the connection after so many bytes of the body
    short: int | None = None  # send only so many bytes, and say so in Content-Length
    change: object = None  # bytes -> bytes, of the body
    content: object = None  # bytes -> bytes, of the file itself
    ignore_range: bool = False
    pause: float = 0.0  # seconds per kilobyte


class HubServer:
    def __init__(self, token=None):
        self.repos, self.store, self.refs = {}, {}, {}  # repo -> commit -> path -> bytes; sha256 -> bytes
        self.faults, self.log, self.token = [], [], token
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.cdn = self.url.replace("127.0.0.1", "localhost")  # another host, as the Hub's content network is
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo, files, branch="main"):
        """Add files by path to a repository; returns the commit."""
        commits = self.repos.setdefault(repo, {})
        old = commits.get(self.refs.get((repo, branch)), {})
        content = {**old, **files}
        listing = json.dumps([len(commits), sorted((p, sha256(c)) for p, c in content.items())])
        commit = hashlib.sha1(listing.encode()).hexdigest()
        commits[commit] = content
        self.refs[repo, branch] = commit
        self.store.update({sha256(c): c for c in files.values()})
        return commit

    def commit_folder(self, repo, folder, prefix=""):
        return self.commit(repo, {prefix + p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()})

    def asked(self, part):
        """The logged requests whose path contains a part."""
        return [entry for entry in self.log if part in entry[1]]

    def _handler(hub):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                hub._get(self, True)

            def do_HEAD(self):
                hub._get(self, False)

            def do_POST(self):
                hub._post(self)

            def do_PUT(self):
                content = self.rfile.read(int(self.headers["Content-Length"]))
                hub.log.append(("PUT", self.path, _lower(self.headers)))
                fault = hub._fault(self.path)
                if fault and fault.status:
                    return hub._send(self, fault.status, b"", fault.headers)
                if sha256(content) == self.path.rpartition("/")[2]:
                    hub.store[sha256(content)] = content
                hub._send(self, 200, b"")

        return Handler

    def _fault(self, path):
        for fault in self.faults:
            if fault.path in path and fault.times > 0:
                fault.times -= 1
                return fault
        return None

    def _send(self, request, status, body, headers=None, with_body=True, fault=None):
        fault = fault or Fault("")
        body = fault.change(body) if fault.change else body
        body = body[: fault.short] if fault.short is not None else body
        request.send_response(status)
        for key, value in {"Content-Length": len(body), **(headers or {})}.items():
            request.send_header(key, str(value))
        request.end_headers()
        if not with_body:
            return
        try:
            end = len(body) if fault.cut is None else min(len(body), fault.cut)
            step = 1024 if fault.pause else max(1, end)
            for start in range(0, end, step):
                request.wfile.write(body[start : min(end, start + step)])
                request.wfile.flush()
                if fault.pause:
                    time.sleep(fault.pause)
            if end < len(body):
                request.close_connection = True
        except (BrokenPipeError, ConnectionResetError):
            request.close_connection = True

    def _get(self, request, with_body):
        path = unquote(urlsplit(request.path).path)
        self.log.append((request.command, path, _lower(request.headers)))
        fault = self._fault(path)
        if fault and fault.status:
            return self._send(request, fault.status, b"", fault.headers, with_body)
        if fault and fault.redirect:
            return self._send(request, 302, b"", {"Location": fault.redirect, **fault.headers}, with_body)
        if path.startswith("/cdn/"):
            return self._file(request, self.store[path[5:]], {"ETag": f'"{path[5:]}"'}, with_body, fault)
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return self._send(request, 401, b"", {"X-Error-Message": "Invalid username or password."}, with_body)
        info = re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path)
        found = info or re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
        repo = found and found[1]
        if repo not in self.repos:
            return self._send(request, 404, b"", {"X-Error-Code": "RepoNotFound"}, with_body)
        revision = found[2] or "main"
        commit = self.refs.get((repo, revision), revision)
        if commit not in self.repos[repo]:
            return self._send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"}, with_body)
        files = self.repos[repo][commit]
        if info:
            siblings = [self._sibling(name, content) for name, content in files.items()]
            answer = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "private": bool(self.token)}
            return self._send(request, 200, json.dumps(answer).encode(), None, with_body, fault)
        if found[3] not in files:
            return self._send(request, 404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
        content = files[found[3]]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_hash(content)}"', **(fault.headers if fault else {})}
        if not found[3].endswith(".safetensors"):
            return self._file(request, content, headers, with_body, fault)
        linked = {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": len(content)}
        headers = {"Location": f"{self.cdn}/cdn/{sha256(content)}", **linked, **headers}
        return self._send(request, 302, b"", headers, with_body)

    def _file(self, request, content, headers, with_body, fault):
        content = fault.content(content) if fault and fault.content else content
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range") or "")
        if not asked or (fault and fault.ignore_range):
            return self._send(request, 200, content, headers, with_body, fault)
        start = int(asked[1])
        if start >= len(content):
            return self._send(request, 416, b"", {"Content-Range": f"bytes */{len(content)}"}, with_body)
        part = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self._send(request, 206, content[start:], {**headers, **part}, with_body, fault)

    def _sibling(self, name, content):
        entry = {"rfilename": name, "size": len(content), "blobId": git_hash(content)}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
        return entry

    def _post(self, request):
        length = int(request.headers.get("Content-Length") or 0)
        body, path = request.rfile.read(length), unquote(urlsplit(request.path).path)
        self.log.append(("POST", path, _lower(request.headers)))
        fault = self._fault(path)
        if fault and fault.status:
            return self._send(request, fault.status, b"", fault.headers)
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return self._send(request, 401, b"", {"X-Error-Message": "Invalid username or password."})
        answer = self._written(path, body)
        self._send(request, 200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _written(self, path, body):
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.repos.setdefault(repo, {})
            if not self.repos[repo]:
                self.commit(repo, {".gitattributes": b"*.safetensors filter=lfs\n"})
            return {"url": f"{self.url}/{repo}", "id": repo}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if "/preupload/" in path:
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]
            return {"files": [{**mode, "shouldIgnore": False} for mode in modes]}
        if path.endswith("/info/lfs/objects/batch"):
            objects = []
            for wanted in json.loads(body)["objects"]:
                upload = {"upload": {"href": f"{self.url}/upload/{wanted['oid']}", "header": {}}}
                objects.append(wanted if wanted["oid"] in self.store else {**wanted, "actions": upload})
            return {"transfer": "basic", "objects": objects}
        repo, branch = re.fullmatch(r"/api/models/(.+)/commit/(.+)", path).groups()
        files = {}
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.store[entry["value"]["oid"]]
        commit = self.commit(repo, files, branch)
        return {"commitUrl": f"{self.url}/{repo}/commit/{commit}", "commitOid": commit, "pullRequestUrl": None}


def go_online(monkeypatch):
    """Let huggingface_hub talk to the server: tests are offline, and the machine may have a proxy."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    huggingface_hub.close_session()


def client(server, token=False, **options):
    """A client that may be sent to the server's content network, as it is for the public Hub by itself."""
    return Web(server.url, token, **{"hosts": [server.cdn.removeprefix("http://")], **options})
