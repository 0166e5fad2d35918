"""A small Hub on loopback, as huggingface_hub speaks to it: repositories with commits, LFS storage, tokens, and faults.

    with Hub() as hub:
        HfApi(endpoint=hub.url, token=TOKEN).upload_folder(...)

A fault is put in with `hub.fail(method, path, action, times)`: the next `times` requests of that method whose path the
regular expression `path` finds are answered with a status (an int), are cut off in the middle of the body ("cut") or
after they were carried out ("lost"), or are answered late ("slow").
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "loopbackTestToken" * 2
USER = "tester"
SLOW_SECONDS = 2.0


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    # Each commit: its 40-digit id, message, and the whole content by path.
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][2] if self.commits else {}

    def commit(self, message: str, files: dict[str, bytes]) -> str:
        state = [len(self.commits), message, *((path, _git_oid(content)) for path, content in sorted(files.items()))]
        oid = hashlib.sha1(repr(state).encode()).hexdigest()
        self.commits.append((oid, message, files))
        return oid

    def at(self, revision: str):
        """The commit that a branch or a commit id names."""
        if revision == "main" and self.commits:
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class Hub:
    """The server; a context manager. `requests` lists (method, path) of what was asked, `stored` the LFS uploads."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.stored: list[str] = []
        self._faults: list[list] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    def fail(self, method: str, path: str, action, times: int = 1):
        self._faults.append([method, path, action, times])

    def heal(self):
        self._faults.clear()

    def fault(self, method: str, path: str):
        for fault in self._faults:
            if fault[0] == method and fault[3] > 0 and re.search(fault[1], path):
                fault[3] -= 1
                return fault[2]
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.handle_request("GET")

    def do_HEAD(self):
        self.handle_request("HEAD")

    def do_POST(self):
        self.handle_request("POST")

    def do_PUT(self):
        self.handle_request("PUT")

    def handle_request(self, method: str):
        url = urlsplit(self.path)
        self.route, self.query = unquote(url.path), parse_qs(url.query)
        self.hub.requests.append((method, self.route))
        fault = self.hub.fault(method, self.route)
        if fault == "cut":
            self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0))))
            self.hang_up()
            return
        if fault == "slow":
            time.sleep(SLOW_SECONDS)
        self.body = self.read_body()
        self.loses_answer = fault == "lost"
        if isinstance(fault, int):
            code = {404: "RepoNotFound"}.get(fault)
            self.answer({"error": f"injected {fault}"}, fault, {"X-Error-Code": code} if code else {})
            return
        for pattern, function in _ROUTES:
            if match := re.fullmatch(pattern, f"{method} {self.route}"):
                function(self, **{name: value for name, value in match.groupdict().items() if value is not None})
                return
        self.answer({"error": f"no route {method} {self.route}"}, 404)

    def hang_up(self):
        self.close_connection = True
        self.connection.close()

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, value, status: int = 200, headers: dict = {}):
        if self.loses_answer:
            self.hang_up()
            return
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, repo: str) -> Repository | None:
        """The repository, or None after an answer that says why not."""
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not self.authorised):
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return None
        return found

    def write_access(self, repo: str) -> bool:
        if not self.authorised:
            self.answer({"error": "Invalid username or password."}, 401)
        elif not repo.startswith(f"{USER}/"):
            self.answer({"error": "You don't have the rights to write there."}, 403)
        else:
            return True
        return False

    # The routes

    def whoami(self):
        if self.authorised:
            auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
            self.answer({"type": "user", "name": USER, "orgs": [], "auth": auth})
        else:
            self.answer({"error": "Invalid credentials"}, 401)

    def create(self):
        wanted = json.loads(self.body)
        repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if not self.write_access(repo):
            return
        known = repo in self.hub.repositories
        if not known:
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.hub.repositories[repo] = Repository(private=private)
            self.hub.repositories[repo].commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer({"url": f"{self.hub.url}/{repo}", "id": repo}, 409 if known else 200)

    def validate_yaml(self):
        """As far as the Hub's own validation is known: a licence, and results with all that a table of them needs."""
        metadata = yaml.safe_load(json.loads(self.body)["content"].split("---\n")[1]) or {}
        errors = [] if isinstance(metadata.get("license"), str) else ['"license" must be a string']
        for model in metadata.get("model-index", []):
            for result in model["results"]:
                known = result["task"].get("type"), result["dataset"].get("type"), result["dataset"].get("name")
                if not all(known) or not all({"type", "value"} <= set(metric) for metric in result["metrics"]):
                    errors.append('"model-index" lacks something')
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        self.answer(answer, 400 if errors else 200)

    def preupload(self, repo, revision):
        if not self.write_access(repo) or not (repository := self.repository(repo)):
            return
        answers = []
        for file in json.loads(self.body)["files"]:
            lfs = file["path"].endswith((".safetensors", ".png")) or file["path"] == "tokenizer.json"
            content = repository.files.get(file["path"])
            answers.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    **({} if content is None else {"oid": _sha256(content) if lfs else _git_oid(content)}),
                }
            )
        self.answer({"files": answers})

    def lfs_batch(self, repo):
        if not self.write_access(repo):
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs:
                actions = ("upload", f"{self.hub.url}/lfs/{entry['oid']}"), ("verify", f"{self.hub.url}/verify")
                entry["actions"] = {name: {"href": href, "header": {}} for name, href in actions}
            objects.append(entry)
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if _sha256(self.body) != oid:
            self.answer({"error": "the content is not what was announced"}, 400)
            return
        self.hub.lfs[oid] = self.body
        self.hub.stored.append(oid)
        self.answer({})

    def lfs_verify(self):
        self.answer({} if json.loads(self.body)["oid"] in self.hub.lfs else {"error": "missing"})

    def commit(self, repo, revision):
        if not self.write_access(repo) or not (repository := self.repository(repo)):
            return
        files, message = dict(repository.files), ""
        for line in filter(None, self.body.splitlines()):
            entry = json.loads(line)
            value = entry["value"]
            match entry["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.lfs[value["oid"]]
                case "deletedFile":
                    files.pop(value["path"], None)
        oid = repository.commit(message, files)
        self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def info(self, repo, revision="main"):
        if not (repository := self.repository(repo)):
            return
        if not (commit := repository.at(revision)):
            self.answer({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return
        readme = commit[2].get("README.md", b"").decode()
        front_matter = readme.split("---\n")[1] if readme.startswith("---\n") else ""
        self.answer(
            {
                "cardData": yaml.safe_load(front_matter) or {},
                "id": repo,
                "modelId": repo,
                "sha": commit[0],
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "lastModified": "2026-01-01T00:00:00.000Z",
                "createdAt": "2026-01-01T00:00:00.000Z",
                "tags": [],
                "siblings": [{"rfilename": path, "size": len(content)} for path, content in commit[2].items()],
            }
        )

    def tree(self, repo, revision, path=""):
        if not (repository := self.repository(repo)):
            return
        commit = repository.at(revision)
        entries, directories = [], set()
        for name, content in commit[2].items() if commit else ():
            if path and not name.startswith(f"{path}/"):
                continue
            entries.append(_entry(name, content))
            parents = name.split("/")[:-1]
            directories |= {"/".join(parents[: i + 1]) for i in range(len(parents))}
        if not entries:
            self.answer({"error": "no such entry"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        entries += [{"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(directories)]
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            depth = path.count("/") + 1 if path else 0
            entries = [entry for entry in entries if entry["path"].count("/") == depth]
        self.answer(entries)

    def paths_info(self, repo, revision):
        if not (repository := self.repository(repo)):
            return
        text = self.body.decode()
        wanted = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
        files = repository.at(revision)[2]
        self.answer([_entry(path, files[path]) for path in wanted if path in files])

    def list_commits(self, repo, revision):
        if repository := self.repository(repo):
            entry = {"authors": [{"user": USER}], "date": "2026-01-01T00:00:00.000Z", "message": ""}
            self.answer([{"id": oid, "title": title, **entry} for oid, title, _ in reversed(repository.commits)])

    def refs(self, repo):
        if repository := self.repository(repo):
            commit = repository.commits[-1][0]
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": commit}
            self.answer({"branches": [main], "tags": [], "converts": []})

    def resolve(self, repo, revision, path):
        if not (repository := self.repository(repo)):
            return
        if repository.gated and not self.authorised:
            self.answer({"error": "Access is restricted."}, 403, {"X-Error-Code": "GatedRepo"})
            return
        commit = repository.at(revision)
        if commit is None:
            self.answer({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return
        content = commit[2].get(path)
        headers = {"X-Repo-Commit": commit[0], "Accept-Ranges": "bytes"}
        if content is None:
            self.answer({"error": "no such entry"}, 404, {"X-Error-Code": "EntryNotFound", **headers})
            return
        headers["ETag"] = f'"{_sha256(content)}"'
        if (wanted := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) and self.command == "GET":
            start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            self.answer(content[start : end + 1], 206, headers)
        else:
            self.answer(content, 200, headers)


def _entry(path: str, content: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_API = rf"/api/models/{_REPO}"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate_yaml),
    (rf"POST {_API}/preupload/{_REVISION}", _Handler.preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"PUT /lfs/(?P<oid>[0-9a-f]+)", _Handler.lfs_put),
    (r"POST /verify", _Handler.lfs_verify),
    (rf"POST {_API}/commit/{_REVISION}", _Handler.commit),
    (rf"POST {_API}/paths-info/{_REVISION}", _Handler.paths_info),
    (rf"GET {_API}/tree/{_REVISION}(?:/(?P<path>.+))?", _Handler.tree),
    (rf"GET {_API}/commits/{_REVISION}", _Handler.list_commits),
    (rf"GET {_API}/refs", _Handler.refs),
    (rf"GET {_API}/revision/{_REVISION}", _Handler.info),
    (rf"GET {_API}", _Handler.info),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
]
