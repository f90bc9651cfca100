"""The Hugging Face hub on this machine: answers made from files that lie in the hub's layout.

A folder `models/ORG/NAME` or `datasets/ORG/NAME` is a repository. What the libraries ask of the
hub's API is answered in its form; nothing else can be reached.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DAY = "2024-01-01T00:00:00.000Z"


def entry(root: Path, path: Path) -> dict:
    "What the hub says of one file of a repository, or of a folder in it."
    name = str(path.relative_to(root))
    if path.is_dir():
        return dict(type="directory", path=name, oid=COMMIT, size=0)
    oid = hashlib.sha1(path.read_bytes()).hexdigest()
    return dict(type="file", path=name, oid=oid, size=path.stat().st_size)


def about(kind: str, name: str, root: Path) -> dict:
    "What the hub says of a repository."
    files = sorted(p for p in root.rglob("*") if p.is_file())
    siblings = [dict(rfilename=str(p.relative_to(root))) for p in files]
    own = dict(private=False, gated=False, disabled=False, tags=[], downloads=1, likes=0)
    own |= dict(lastModified=DAY, createdAt=DAY, author=name.split("/")[0])
    return own | dict(_id=COMMIT[:24], id=name, modelId=name, sha=COMMIT, siblings=siblings)


class Answers(BaseHTTPRequestHandler):
    "Answers to the requests that the libraries make."

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        "Say nothing."

    def give(self, code: int, content: bytes, headers: dict):
        "Send one answer."
        self.send_response(code)
        for name, value in dict({"Content-Length": str(len(content))}, **headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def give_json(self, what):
        "Send an answer of the API."
        self.give(200, json.dumps(what).encode(), {"Content-Type": "application/json"})

    def missing(self, code: str = "EntryNotFound"):
        "Say that there is no such thing."
        self.server.asked_in_vain.append(self.path)
        self.give(404, b"{}", {"X-Error-Code": code})

    def give_file(self, path: Path):
        "Send a file, or the range of it that is asked for."
        content = path.read_bytes()
        etag = hashlib.sha1(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        code, asked = 200, self.headers.get("Range", "")
        if asked.startswith("bytes=") and self.command == "GET":
            first, _, last = asked[6:].partition("-")
            start, end = int(first), min(int(last or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            code, content = 206, content[start : end + 1]
        self.give(code, content, headers)

    def parts(self) -> list[str]:
        "The parts of the path that is asked for."
        return [unquote(p) for p in urlsplit(self.path).path.split("/") if p]

    def api(self, parts: list[str], body: dict):
        "Answer `api/KIND/ORG/NAME/…`."
        kind, rest = parts[0], parts[3:]
        name = "/".join(parts[1:3])
        root = self.server.root / kind / name
        if not root.is_dir():
            return self.missing("RepoNotFound")
        if not rest or rest[0] == "revision":
            return self.give_json(about(kind, name, root))
        if rest[0] == "tree":
            top = root.joinpath(*rest[2:])
            deep = "true" in parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower()
            if not top.exists():
                return self.missing()
            return self.give_json([entry(root, p) for p in top.glob("**/*" if deep else "*")])
        if rest[0] == "paths-info":
            found = [root / p for p in body.get("paths", [])]
            return self.give_json([entry(root, p) for p in found if p.exists()])
        return self.missing()

    def do_GET(self):
        "Answer a request."
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        parts = self.parts()
        if not parts:
            return self.give(200, b"", {})
        if parts[0] == "api":
            form = body[:1] == b"{"
            given = json.loads(body) if form else parse_qs(body.decode())
            return self.api(parts[1:], given)
        kind = "datasets" if parts[0] == "datasets" else "models"
        parts = parts[1:] if kind == "datasets" else parts
        root = self.server.root.joinpath(kind, *parts[:2])
        path = root.joinpath(*parts[4:])
        if not root.is_dir():
            return self.missing("RepoNotFound")
        return self.give_file(path) if path.is_file() else self.missing()

    do_HEAD = do_GET
    do_POST = do_GET


def served(root: Path) -> ThreadingHTTPServer:
    "A hub of the repositories below `root`, until `shutdown()`; `address` is where it is."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.root, server.asked_in_vain = root, []
    server.daemon_threads = True
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
