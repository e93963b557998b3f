#!/usr/bin/env python3
"""The tests of Aegis: real tmux, real sockets, real sqlite, real processes.

    python3 -m pytest -q                 all of it; the last section runs when `claude` is installed
    python3 -m pytest -q -k 'not real'   without the real client

Sections stand in the order of the rooms of aegis.py, under the same titles.  The demo agent takes
its stage directions from the prompt, so a test reads on one line: `[[say hi]]`, `[[wait 0.3]]`,
`[[bash rm x]]` (asks first), `[[hang]]`, `[[exit]]`.  Nothing here sleeps for a fixed time: tests
wait on the event stream, or poll with `eventually`.  To add a test of an endpoint: name it
test_<handler>_<what holds>; EVERY ROUTE counts them.
"""
from __future__ import annotations

import ast
import concurrent.futures
import contextlib
import hashlib
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import unicodedata
import urllib.parse
import uuid
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import pytest

import aegis

Json = Dict[str, Any]

HERE = Path(__file__).resolve().parent
AEGIS = HERE / "aegis.py"
README = HERE / "README.md"
WITHIN = 20.0        # seconds until something that should happen at once counts as lost
TURNS = int(os.environ.get("AEGIS_TEST_TURNS", "200"))            # exact turns on the demo agent
REAL_TURNS = int(os.environ.get("AEGIS_TEST_REAL_TURNS", "10"))   # and on the real client


# ============================================================================
# THE STAGE. Fixtures and helpers; nothing is tested here.
# ============================================================================


def eventually(check: Callable[[], Any], within: float = WITHIN) -> Any:
    """Poll until `check` gives something true, and give that; what it raises counts as not yet."""
    until = time.monotonic() + within
    while True:
        try:
            last = check()
        except (OSError, AssertionError, LookupError, ValueError, aegis.TmuxError) as error:
            last = error
        if last and not isinstance(last, Exception):
            return last
        if time.monotonic() > until:
            raise AssertionError(f"not within {within:g} s; the last look gave {last!r}")
        time.sleep(0.01)


class Answer(NamedTuple):
    """One HTTP answer."""

    status: int
    json: Any
    headers: Any
    raw: bytes


class Event(NamedTuple):
    """One event as a browser's EventSource would hand it out."""

    id: str
    type: str
    data: str


class Stream:
    """The parsing rules of EventSource (HTML standard, 9.2.6): bytes of lines in, events out."""

    def __init__(self) -> None:
        self.last_id, self.retry, self.comments = "", None, 0  # type: str, Optional[int], int
        self.kind, self.data, self.new_id = "", [], ""          # type: str, List[str], str

    def feed(self, raw: bytes) -> Optional[Event]:
        """Take one line; gives the event that a blank line completes."""
        line = raw.decode("utf-8").rstrip("\r\n")
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value[1:] if value.startswith(" ") else value
        if not name:
            self.comments += 1
        elif name == "event":
            self.kind = value
        elif name == "data":
            self.data.append(value)
        elif name == "id" and "\0" not in value:
            self.new_id = value
        elif name == "retry" and value.isascii() and value.isdigit():
            self.retry = int(value)
        return None

    def _dispatch(self) -> Optional[Event]:
        self.last_id, kind, data = self.new_id, self.kind or "message", self.data
        self.kind, self.data = "", []
        return Event(self.last_id, kind, "\n".join(data)) if data else None


class Events(threading.Thread):
    """A subscriber: remembers all it heard, and comes back with the last id when the stream ends."""

    def __init__(self, server: "Server", path: str = "/v1/events?after=0", **headers: str) -> None:
        super().__init__(daemon=True)
        self.server, self.path, self.headers = server, path, headers
        self.parser, self.heard = Stream(), []  # type: Stream, List[Json]
        self.news, self.closed = threading.Condition(), threading.Event()
        self.connections = 0
        self.start()

    def run(self) -> None:
        """Listen until closed."""
        while not self.closed.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                self._listen()
            self.closed.wait(0.02)   # a browser would wait for `retry`; tests have no time

    def _listen(self) -> None:
        again = {"Last-Event-ID": self.parser.last_id} if self.parser.last_id else {}
        self.line = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        self.line.request("GET", self.path, headers={**self.server.auth, **self.headers, **again})
        answer = self.line.getresponse()
        if answer.status != 200:
            return
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        self.connections += 1
        while True:
            raw = answer.readline()
            if not raw or self.closed.is_set():
                return
            self._hear(self.parser.feed(raw))

    def _hear(self, event: Optional[Event]) -> None:
        if event is None:
            return
        data = json.loads(event.data)
        assert (str(data["id"]), data["type"]) == (event.id, event.type)
        with self.news:
            self.heard.append({**data, "heardAt": time.monotonic()})
            self.news.notify_all()

    def find(self, kind: Union[str, Tuple[str, ...]], session: Optional[str], after: int, wanted: Json) -> Optional[Json]:
        """Give the first event that fits."""
        kinds = (kind,) if isinstance(kind, str) else kind
        return next((one for one in self.heard if one["id"] > after and one["type"] in kinds
                     and session in (None, one["sessionId"]) and wanted.items() <= one.items()), None)

    def wait_for(self, kind: Union[str, Tuple[str, ...]], session: Optional[str] = None, after: int = 0,
                 within: float = WITHIN, **wanted: Any) -> Json:
        """Wait for the first event behind `after` that fits."""
        with self.news:
            self.news.wait_for(lambda: self.find(kind, session, after, wanted), within)
            found = self.find(kind, session, after, wanted)
            seen = [(one["id"], one["type"]) for one in self.heard if session in (None, one["sessionId"])][-30:]
        assert found, f"no {kind} {wanted or ''} behind {after} within {within:g} s; the last were {seen}"
        return found

    def of(self, session: str, *kinds: str) -> List[str]:
        """List the types of a session's events so far, or of those that begin as one of `kinds`."""
        with self.news:
            return [one["type"] for one in self.heard if one["sessionId"] == session and one["type"].startswith(kinds or "")]

    def close(self) -> None:
        """Hang up."""
        self.closed.set()
        with contextlib.suppress(OSError, AttributeError):
            self.line.sock.shutdown(socket.SHUT_RDWR)


class Server:
    """One Aegis as a process, with a state directory, a home and a tmux server of its own."""

    def __init__(self, *flags: str, demo: bool = True, **env: str) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="ae-", dir="/tmp")).resolve()  # short: a socket's path holds 104 bytes
        self.state, self.work = self.root / "s", self.root / "w"
        self.work.mkdir()
        self.flags = (*(("--demo",) if demo else ()), *flags)
        self.env = {**clean_environment(self.root), "AEGIS_CLAUDE_CMD": "no-such-claude", **env}
        self.auth = {"Authorization": f"Bearer {env['AEGIS_AUTH_TOKEN']}"} if "AEGIS_AUTH_TOKEN" in env else {}
        self.log, self.port, self.process = self.root / "log", 0, None  # type: Path, int, Any
        self.spare: Optional[Talk] = None
        self._events: Optional[Events] = None
        self._token: List[str] = []

    # -- the process

    def start(self, port: Optional[int] = None) -> "Server":
        """Start it, and wait until it listens: on the same port as before, or on `port`."""
        begin = self.log.stat().st_size if self.log.exists() else 0
        argv = [sys.executable, str(AEGIS), "--port", str(self.port if port is None else port), *self.flags]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.env, cwd="/",
                                            start_new_session=True)
        self.port = int(eventually(lambda: self._listening(begin)))
        return self

    def _listening(self, begin: int) -> str:
        said = self.log.read_bytes()[begin:].decode("utf-8", "replace")
        if self.process.poll() is not None:
            pytest.fail(f"the server ended with {self.process.returncode}: {said}")
        found = re.search(r"aegis \S+ listening on http://\S+?:(\d+)\s", said)
        return found.group(1) if found else ""

    def signal(self, how: int, within: float = WITHIN) -> int:
        """Send the server a signal and wait for its end; gives its exit code."""
        self.process.send_signal(how)
        return self.process.wait(within)

    def crash(self) -> "Server":
        """Kill it as the kernel would; agents go on."""
        self.signal(signal.SIGKILL)
        return self

    def close(self) -> None:
        """End the server, its tmux and all that runs in it; never raises."""
        if self._events:
            self._events.close()
        with contextlib.suppress(Exception):
            self.process.kill()
            self.process.wait(5)
        with contextlib.suppress(Exception):
            for pid in self.tmux("list-panes", "-a", "-F", "#{pane_pid}").split():
                with contextlib.suppress(OSError):
                    os.killpg(int(pid), signal.SIGKILL)
            self.tmux("kill-server")
        shutil.rmtree(self.root, ignore_errors=True)

    @property
    def socket(self) -> str:
        """Name the private tmux socket, as the settings table says it."""
        return "aegis-" + hashlib.sha256(str(self.state).encode()).hexdigest()[:8]

    def tmux(self, *words: str) -> str:
        """Run a tmux command as a person at the terminal would."""
        done = subprocess.run(["tmux", "-u", "-L", self.socket, *words], env=self.env, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=10)
        if done.returncode:
            raise OSError(f"tmux {words[0]}: {done.stderr.decode()}")
        return done.stdout.decode()

    # -- requests

    def call(self, route: str, body: Any = None, headers: Optional[Json] = None, auth: bool = True) -> Answer:
        """Make one request: call("POST /v1/sessions", {...})."""
        method, path = route.split(" ", 1)
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=90)
        raw = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {**({"Content-Type": "application/json"} if raw is not None else {}), **(self.auth if auth else {}),
                **(headers or {})}
        try:
            line.request(method, path, raw, sent)
            answer = line.getresponse()
            text = answer.read()
            return Answer(answer.status, json.loads(text) if text else None, answer.headers, text)
        finally:
            line.close()

    def ask(self, route: str, body: Any = None, headers: Optional[Json] = None) -> Any:
        """Make one request that must succeed, and give its JSON."""
        answer = self.call(route, body, headers)
        assert answer.status in (200, 201), f"{route}: {answer.status} {answer.raw[:500]!r}"
        return answer.json

    def refusal(self, route: str, body: Any = None, headers: Optional[Json] = None, auth: bool = True) -> Tuple[int, str]:
        """Make one request that must be refused in the contract's envelope; gives status and code."""
        answer = self.call(route, body, headers, auth)
        assert answer.status >= 400, f"{route}: {answer.status} {answer.raw[:500]!r}"
        check_envelope(answer)
        return answer.status, answer.json["code"]

    @property
    def events(self) -> Events:
        """The one stream that tests of this server wait on."""
        self._events = self._events or Events(self)
        return self._events

    def open(self, prompt: Optional[str] = None, ready: bool = True, **body: Any) -> "Talk":
        """Create a session; without a prompt, wait until it is ready."""
        body.setdefault("workDir", str(self.work))
        if prompt is not None:
            body["prompt"] = prompt
        talk = Talk(self, self.ask("POST /v1/sessions", body))
        if ready and prompt is None:
            talk.wait("session.ready")
            talk.wait("session.idle")
        return talk


def clean_environment(root: Path) -> Dict[str, str]:
    """Give a deliberate environment with a home of its own, and sockets that go with it."""
    (root / "home").mkdir(exist_ok=True)
    return {"PATH": os.environ["PATH"], "HOME": str(root / "home"), "LANG": "C.UTF-8", "TERM": "xterm-256color",
            "TMUX_TMPDIR": str(root), "AEGIS_STATE_DIR": str(root / "s")}


def check_envelope(answer: Answer) -> None:
    """Hold a refusal against the contract's error envelope."""
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.json["statusCode"] == answer.status
    assert re.fullmatch(r"[A-Z][A-Z0-9_]+", answer.json["code"])
    assert isinstance(answer.json["error"], str) and len(answer.json["error"]) > 8


class Talk:
    """One session as a test sees it.  wait() goes forward: each event is found behind the last one waited for."""

    def __init__(self, server: Server, created: Json) -> None:
        self.server, self.created, self.id, self.seen = server, created, created["id"], 0
        self.delivery = created.get("promptDelivery")

    def call(self, verb: str, body: Any = None, **headers: str) -> Answer:
        """Make a request below the session: call("POST send", {...}); "GET" alone is the session itself."""
        method, _, rest = verb.partition(" ")
        return self.server.call(f"{method} /v1/sessions/{self.id}" + (f"/{rest}" if rest else ""), body,
                                {name.replace("_", "-"): value for name, value in headers.items()})

    def ask(self, verb: str, body: Any = None, **headers: str) -> Any:
        """The same, and it must succeed."""
        answer = self.call(verb, body, **headers)
        assert answer.status == 200, f"{verb}: {answer.status} {answer.raw[:500]!r}"
        return answer.json

    def refusal(self, verb: str, body: Any = None, **headers: str) -> Tuple[int, str]:
        """The same, and it must be refused."""
        answer = self.call(verb, body, **headers)
        assert answer.status >= 400, f"{verb}: {answer.status} {answer.raw[:500]!r}"
        check_envelope(answer)
        return answer.status, answer.json["code"]

    def wait(self, kind: Union[str, Tuple[str, ...]], within: float = WITHIN, **wanted: Any) -> Json:
        """Wait for the session's next event of a kind."""
        found = self.server.events.wait_for(kind, self.id, self.seen, within, **wanted)
        self.seen = found["id"]
        return found

    def send(self, text: str, **headers: str) -> Json:
        """Send a prompt."""
        return self.ask("POST send", {"text": text}, **headers)

    def say(self, text: str, kind: str = "POST send") -> Json:
        """Send a prompt, wait until its turn has ended, and read."""
        field = "text" if kind == "POST send" else "command"
        sent = self.ask(kind, {field: text})
        self.wait(("prompt.done", "prompt.failed"), promptId=sent["promptId"])
        return self.read()

    def read(self, query: str = "wait=idle&timeout=30") -> Json:
        """Read the session, by default when it needs its caller."""
        return self.ask(f"GET read?{query}")

    def prompts(self) -> List[str]:
        """List what the agent itself reports as prompts, from its transcript."""
        return [text for kind, text in transcript(self.get()["transcriptPath"]) if kind == "prompt"]

    def get(self) -> Json:
        """Get the session."""
        return self.ask("GET")

    @property
    def status(self) -> str:
        """Get its status."""
        return self.get()["status"]

    def kill(self) -> Json:
        """Kill it."""
        return self.ask("DELETE")


def transcript(path: str) -> List[Tuple[str, str]]:
    """Read an agent's own transcript: ("prompt" | "answer" | "interrupt", text) in order."""
    found = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        content = entry.get("message", {}).get("content") if isinstance(entry.get("message"), dict) else None
        if entry.get("type") not in ("user", "assistant") or entry.get("isMeta") or not content:
            continue
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for block in blocks:
            if block.get("type") == "text":
                said = block["text"]
                kind = "answer" if entry["type"] == "assistant" else "interrupt" if said.startswith("[Request interr") else "prompt"
                found.append((kind, said))
    return found


def alive(pid: int) -> bool:
    """Tell whether a process exists and is no zombie."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], stdout=subprocess.PIPE)
    return done.returncode == 0 and not done.stdout.strip().startswith(b"Z")


def command_lines() -> str:
    """Give the command lines of all processes."""
    return subprocess.run(["ps", "axww", "-o", "command"], stdout=subprocess.PIPE).stdout.decode("utf-8", "replace")


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The server that most tests share."""
    shared = Server("--log-level", "debug").start()
    yield shared
    shared.close()


@pytest.fixture(scope="session")
def strict() -> Iterator[Server]:
    """A server with every lock closed: token, allowed directories, no trust, JSON log, fast heartbeat."""
    shared = Server("--log-format", "json", "--heartbeat-seconds", "0.05", "--trust-workdir", "off",
                    "--allowed-hosts", "box.example", "--allowed-origins", "https://panel.example",
                    "--create-seconds", "1", AEGIS_AUTH_TOKEN="s3cret-tökén".encode("utf-8").hex())
    shared.env["AEGIS_WORK_DIRS"] = str(shared.work)
    shared.start()
    yield shared
    shared.close()


@pytest.fixture
def make(server: Server) -> Iterator[Callable[..., Talk]]:
    """Create sessions on the shared server that end with the test."""
    made: List[Talk] = []

    def create(prompt: Optional[str] = None, **body: Any) -> Talk:
        made.append(server.open(prompt, **body))
        return made[-1]
    yield create
    if made:
        server.call("DELETE /v1/sessions/batch", {"ids": [talk.id for talk in made]})


@pytest.fixture
def talk(server: Server) -> Talk:
    """An idle session that many tests share; one that was left otherwise is replaced."""
    spare = server.spare
    if spare is None or (spare.get()["status"], spare.get()["queueLength"]) != ("idle", 0):
        if spare is not None:
            spare.kill()
        spare = server.spare = server.open()
    return spare


@pytest.fixture
def house() -> Iterator[Callable[..., Server]]:
    """Start servers of a test's own."""
    made: List[Server] = []

    def start(*flags: str, **env: str) -> Server:
        made.append(Server(*flags, **env))
        return made[-1].start()
    yield start
    for one in made:
        one.close()


def run_aegis(*words: str, root: Optional[Path] = None, within: float = WITHIN, **env: str) -> Any:
    """Run aegis.py to its end; gives the finished process."""
    with tempfile.TemporaryDirectory(prefix="ae-", dir="/tmp") as fresh:
        return subprocess.run([sys.executable, str(AEGIS), *words], env={**clean_environment(root or Path(fresh)), **env},
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=within,
                              universal_newlines=True)


# ============================================================================
# SETTINGS. What an operator may choose.
# ============================================================================


@pytest.mark.parametrize("words, env, names", [
    (("--port", "x"), {}, "port"),
    (("--port", "70000"), {}, "port"),
    ((), {"AEGIS_PORT": "-1"}, "AEGIS_PORT"),
    (("--log-level", "loud"), {}, "log"),
    ((), {"AEGIS_AGENT": "cat"}, "AEGIS_AGENT"),
    (("--ready-seconds", "0"), {}, "ready"),
    ((), {"AEGIS_TRUST_WORKDIR": "perhaps"}, "AEGIS_TRUST_WORKDIR"),
    ((), {"AEGIS_CLAUDE_CMD": "claude 'unclosed"}, "AEGIS_CLAUDE_CMD"),
    (("--no-such-flag",), {}, "no-such-flag"),
    (("--auth-token", "x"), {}, "auth-token"),
    (("--host", "0.0.0.0"), {}, "AEGIS_AUTH_TOKEN"),
    (("--host", "::"), {}, "AEGIS_AUTH_TOKEN"),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else None)
def test_a_bad_setting_stops_the_start_and_is_named(words, env, names):
    done = run_aegis(*words, **env)
    assert done.returncode == 2
    assert names in done.stderr and "Traceback" not in done.stderr


def test_a_flag_outranks_its_variable():
    chosen = aegis.read_settings(["--log-level", "error"], {"AEGIS_LOG_LEVEL": "debug", "AEGIS_KEEP_EVENTS": "7"})
    assert (chosen.log_level, chosen.keep_events) == ("error", 7)


def test_help_names_every_setting_but_shows_no_secret():
    told = run_aegis("--help", AEGIS_AUTH_TOKEN="hush-hush").stdout
    for setting in aegis.SETTINGS:
        assert (f"--{setting.name.replace('_', '-')}" if setting.flag else f"AEGIS_{setting.name.upper()}") in told
    assert "hush-hush" not in told


def test_version_is_told():
    assert aegis.__version__ in run_aegis("--version").stdout


def test_two_state_directories_never_share_a_tmux_socket():
    names = {aegis.Settings({"state_dir": place}).tmux_socket for place in ("~/.aegis", "/tmp/one", "/tmp/two")}
    assert len(names) == 3 and "aegis" in names


def test_the_state_directory_is_for_its_owner_alone(server):
    made = [server.state, *server.state.rglob("*")]
    open_to_others = [str(path) for path in made if path.exists() and path.lstat().st_mode & 0o077 and not path.is_symlink()
                      and not any(part in ("demo", "cache") for part in path.relative_to(server.root).parts)]
    assert open_to_others == [] and len(made) > 3


def test_a_state_directory_that_was_open_to_others_is_closed(house):
    own = Server()
    try:
        own.state.mkdir(mode=0o755)
        own.start()
        assert own.state.stat().st_mode & 0o777 == 0o700
    finally:
        own.close()


def test_a_second_server_on_one_state_directory_says_so_and_leaves(server):
    done = run_aegis("--port", "0", "--demo", AEGIS_STATE_DIR=str(server.state))
    assert done.returncode == 3
    assert str(server.process.pid) in done.stderr and "Traceback" not in done.stderr
    assert server.ask("GET /v1/health")["status"] == "ok"


def test_a_taken_port_is_a_plain_message_and_harms_nobody(server):
    done = run_aegis("--port", str(server.port), "--demo")
    assert done.returncode not in (0, 2, 3)
    assert str(server.port) in done.stderr and "Traceback" not in done.stderr
    assert server.ask("GET /v1/health")["status"] == "ok"


def test_without_tmux_the_message_says_what_is_missing(house):
    own = Server(AEGIS_TMUX="/no/such/tmux")
    try:
        with contextlib.suppress(pytest.fail.Exception):
            own.start()
            assert own.refusal("POST /v1/sessions", {"workDir": str(own.work)}) == (503, "TMUX_UNAVAILABLE")
            health = own.ask("GET /v1/health")
            assert health["tmux"]["healthy"] is False and "/no/such/tmux" in health["tmux"]["error"]
        said = own.log.read_text()
        assert "/no/such/tmux" in said and "Traceback" not in said
    finally:
        own.close()


# ============================================================================
# TOOLS. ApiError, clock, ids, log.
# ============================================================================


@pytest.mark.parametrize("moment, wanted", [
    (0.0, "1970-01-01T00:00:00.000Z"), (1775638800.0, "2026-04-08T09:00:00.000Z"),
    (1775638800.9996, "2026-04-08T09:00:00.999Z"), (None, None),
])
def test_times_are_written_as_the_contract_does(moment, wanted):
    assert aegis.iso(moment) == wanted


def test_a_log_line_stays_one_line_whatever_is_logged():
    log = aegis.Log("debug", "text")
    for shape in ("text", "json"):
        log.shape = shape
        line = log.shaped((0.0, "info", "evil\nmessage\r", {"path": "/a\nb\x1b[2J"}))
        assert line.count("\n") == 1 and "\r" not in line and "\x1b" not in line


# ============================================================================
# FIELDS. What a request may carry.
# ============================================================================

WORD = aegis.text("A word.", 5, minLength=2, pattern=r"^[a-z]+$")
COUNT = aegis.whole("A count.", 1, 9)


@pytest.mark.parametrize("field, value, faulty", [
    (WORD, "abc", None), (WORD, "a", "at least 2"), (WORD, "abcdef", "at most 5"), (WORD, "ABC", "match"), (WORD, 5, "a string"),
    (WORD, "ab\ud800", "surrogate"),
    (COUNT, 1, None), (COUNT, 0, "at least 1"), (COUNT, 10, "at most 9"), (COUNT, True, "whole number"), (COUNT, 1.5, "whole number"),
    (COUNT, "1", "whole number"),
    (aegis.flag("x"), True, None), (aegis.flag("x"), 1, "true or false"),
    (aegis.choice("x", "a", "b"), "a", None), (aegis.choice("x", "a", "b"), "c", "one of"),
    (aegis.many("x", COUNT, 2), [1, 2], None), (aegis.many("x", COUNT, 2), [1, 2, 3], "at most 2"),
    (aegis.many("x", COUNT, 2), [1, 99], "item 1"), (aegis.many("x", COUNT, 2), {}, "an array"),
    (aegis.number("x", 0, 2), 0.5, None), (aegis.number("x", 0, 2), 3, "at most 2"), (aegis.number("x", 0, 2), float("nan"), "must"),
    (aegis.texts_by_name("x", "[A-Z]+", WORD, 2), {"A": "abc"}, None),
    (aegis.texts_by_name("x", "[A-Z]+", WORD, 2), {"a;b": "abc"}, "a;b"),
    (aegis.texts_by_name("x", "[A-Z]+", WORD, 2), {"A": "x"}, "A"),
])
def test_a_fault_is_named(field, value, faulty):
    said = aegis.complaint(field, value)
    assert said is None if faulty is None else faulty in (said or ""), said


def test_every_fault_is_named_at_once():
    with pytest.raises(aegis.ApiError) as refused:
        aegis.validate({"word": WORD, "count": COUNT, "also": WORD}, {"word": "a", "zebra": 1, "also": "abc"})
    assert refused.value.status == 400
    assert set(refused.value.body()["fields"]) == {"word", "count", "zebra"}
    assert all(name in refused.value.message for name in ("word", "count", "zebra"))


def test_query_words_are_read_as_their_fields_want():
    fields = {"n": COUNT, "on": aegis.flag("x"), "w": WORD}
    assert aegis.from_words(fields, {"n": "7", "on": "1", "w": "12"}) == {"n": 7, "on": True, "w": "12"}
    with pytest.raises(aegis.ApiError):
        aegis.validate(fields, aegis.from_words(fields, {"n": "7x", "on": "on", "w": "abc"}))


# ============================================================================
# STORE. What must survive, in sqlite.
# ============================================================================


@pytest.fixture
def store(tmp_path) -> Iterator[Any]:
    """A database of a test's own."""
    opened = aegis.Store(tmp_path / "aegis.db")
    yield opened
    opened.close()


def put_event(db: Any, kind: str) -> None:
    """Write an event row by plain SQL."""
    db.execute(*aegis.insert("events", {"session": None, "type": kind, "at": 0.0, "data": {}}))


def count_events(store: Any) -> int:
    """Count the event rows."""
    return store.value("SELECT count(*) FROM events")


def test_a_change_that_fails_halfway_leaves_nothing(store):
    with pytest.raises(ZeroDivisionError):
        with store.transaction() as db:
            put_event(db, "one")
            raise ZeroDivisionError
    assert count_events(store) == 0
    with store.transaction() as db:
        put_event(db, "two")
    assert count_events(store) == 1


def test_reopening_finds_what_was_committed(store, tmp_path):
    with store.transaction() as db:
        put_event(db, "kept")
    again = aegis.Store(tmp_path / "aegis.db")
    assert count_events(again) == 1
    again.close()


def test_the_schema_is_counted_and_a_newer_one_is_refused(store, tmp_path):
    assert store.value("PRAGMA user_version") == len(aegis.MIGRATIONS)
    store.db.execute(f"PRAGMA user_version = {len(aegis.MIGRATIONS) + 1}")
    with pytest.raises(aegis.ApiError) as refused:
        aegis.Store(tmp_path / "aegis.db")
    assert "newer" in refused.value.message


@pytest.mark.parametrize("version", range(len(aegis.MIGRATIONS) + 1))
def test_a_database_of_every_earlier_version_is_brought_up_to_date(tmp_path, version):
    path = tmp_path / "old.db"
    old = sqlite3.connect(str(path))
    for number, script in enumerate(aegis.MIGRATIONS[:version], 1):
        old.executescript(f"BEGIN; {script}; PRAGMA user_version = {number}; COMMIT;")
    old.close()
    opened = aegis.Store(path)
    assert opened.value("PRAGMA user_version") == len(aegis.MIGRATIONS)
    assert opened.rows(aegis.SessionRow, "sessions") == []
    opened.close()


def test_two_threads_writing_lose_nothing(store):
    def write(name: str) -> None:
        for _ in range(200):
            with store.transaction() as db:
                put_event(db, name)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(write, ("a", "b")))
    assert count_events(store) == 400


def test_a_locked_database_is_a_503_and_nothing_is_half_written(store, tmp_path):
    store.db.execute("PRAGMA busy_timeout = 20")
    other = sqlite3.connect(str(tmp_path / "aegis.db"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(aegis.ApiError) as refused:
        with store.transaction() as db:
            put_event(db, "lost")
    assert (refused.value.status, refused.value.code) == (503, "STORE_UNAVAILABLE")
    other.execute("ROLLBACK")
    with store.transaction() as db:
        put_event(db, "kept")
    assert [event.type for event in store.rows(aegis.Event, "events")] == ["kept"]
    other.close()


def test_a_full_disk_is_a_503_and_is_recovered_from_without_a_restart(house):
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("this system cannot limit another process' files")
    own = house()
    talk = own.open()
    before = len(talk.prompts()) if talk.get()["transcriptPath"] else 0
    whole = resource.prlimit(own.process.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    for _ in range(3):
        assert own.refusal(f"POST /v1/sessions/{talk.id}/send", {"text": "lost"}) == (503, "STORE_UNAVAILABLE")
    assert own.refusal("POST /v1/sessions", {"workDir": str(own.work), "name": "lost"}) == (503, "STORE_UNAVAILABLE")
    assert talk.status == "idle" and talk.ask("GET queue") == {"queue": []}
    resource.prlimit(own.process.pid, resource.RLIMIT_FSIZE, whole)
    assert talk.say("[[say recovered]]")["output"] == "recovered"
    assert len(talk.prompts()) == before + 1
    assert own.ask("GET /v1/sessions")["pagination"]["total"] == 1


# ============================================================================
# EVENTS. Who wants to know, and what they missed.
# ============================================================================


@pytest.fixture
def bus(store) -> Any:
    """A bus that keeps ten events."""
    return aegis.Bus(store, 10)


def tell(bus: Any, count: int, session: Optional[str] = None, kind: str = "session.idle") -> List[Any]:
    """Publish some events."""
    return bus.commit([], [aegis.Draft(kind, session, {"n": number}) for number in range(count)])


def test_ids_grow_for_ever_and_survive_a_reopening(bus, store):
    first = tell(bus, 2)
    again = aegis.Bus(store, 10)
    second = tell(again, 2)
    ids = [event.id for event in first + second]
    assert ids == sorted(set(ids)) and second[0].id > first[-1].id


def test_a_change_and_its_events_are_stored_together_or_not_at_all(bus, store):
    with pytest.raises((aegis.ApiError, sqlite3.Error)):
        bus.commit([("INSERT INTO nowhere VALUES (1)", ())], [aegis.Draft("session.idle", None, {})])
    assert count_events(store) == 0


def test_a_slow_listener_is_cut_off_and_others_are_unharmed(bus):
    slow, quick = aegis.Listener(), aegis.Listener()
    bus.listen(slow, None), bus.listen(quick, None)
    taken = 0
    for _ in range(aegis.BUS_QUEUE // 100 + 2):
        tell(bus, 100)
        while not quick.queue.empty():
            taken += quick.queue.get() is not None
    assert taken == (aegis.BUS_QUEUE // 100 + 2) * 100 and not quick.cut
    assert slow.cut and slow.queue.qsize() <= aegis.BUS_QUEUE + 1
    bus.leave(slow), bus.leave(quick)
    assert bus.listeners == []


def test_what_is_too_old_is_told_by_a_reset(bus):
    for _ in range(11):
        tell(bus, 100)
    listener = aegis.Listener()
    missed = bus.listen(listener, 1)
    assert missed[0].type == "reset" and missed[-1].id == bus.last
    assert [event.id for event in missed[1:]] == list(range(missed[1].id, bus.last + 1))


def first_content_line(file: Any) -> bytes:
    """Read the next line of a stream that is neither blank nor a chunk's size."""
    return next(one for one in iter(file.readline, b"") if one.strip() and not re.fullmatch(rb"[0-9a-f]+\r\n", one))


def test_the_stream_begins_with_retry_and_frames_are_whole(server, talk):
    with socket.create_connection(("127.0.0.1", server.port), 10) as line:
        line.sendall(b"GET /v1/events?after=0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        file = line.makefile("rb")
        head = list(iter(file.readline, b"\r\n"))
        assert any(one.lower().startswith(b"content-type: text/event-stream") for one in head)
        assert any(one.lower().startswith(b"cache-control:") and b"no-" in one for one in head)
        body = [first_content_line(file) for _ in range(4)]
        assert body[0] == b"retry: 2000\n"
        assert [one.split(b":")[0] for one in body[1:4]] == [b"id", b"event", b"data"]


def test_stream_events_sends_each_event_once_and_in_order(server, make):
    talk = make()
    talk.say("[[say one]]")
    talk.say("[[say two]]")
    ids = [event["id"] for event in server.events.heard]
    assert ids == sorted(set(ids))
    first = server.events.wait_for("session.created", talk.id)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["timestamp"])
    assert server.events.parser.retry == 2000


def test_stream_events_filters_by_type_and_family(server, make):
    narrow = Events(server, "/v1/events?types=prompt.done,session.*")
    talk = make()
    talk.say("[[say one]]")
    narrow.wait_for("prompt.done", talk.id)
    assert {"session.created", "session.idle", "session.working", "prompt.done"} <= set(narrow.of(talk.id))
    assert not any(kind.startswith(("turn.", "prompt.s", "prompt.q")) for kind in narrow.of(talk.id))
    narrow.close()


def test_stream_events_refuses_an_unknown_type_and_an_unknown_session(server):
    assert server.refusal("GET /v1/events?types=session.sleepy") == (400, "INVALID_REQUEST")
    assert server.refusal("GET /v1/events?session=nobody") == (404, "SESSION_NOT_FOUND")
    assert server.refusal("GET /v1/events?after=x") == (400, "INVALID_REQUEST")


@pytest.mark.parametrize("path", ["/v1/events?after=0&session={}", "/v1/sessions/{}/events?after=0"])
def test_stream_session_events_holds_one_session_only(server, make, path):
    ours, other = make(), make()
    narrow = Events(server, path.format(ours.id))
    other.say("[[say other]]")
    ours.say("[[say ours]]")
    narrow.wait_for("prompt.done", ours.id)
    assert {event["sessionId"] for event in narrow.heard} == {ours.id}
    narrow.close()


def test_stream_events_replays_exactly_what_was_missed(server, make):
    talk = make()
    talk.say("[[say one]]")
    mark = talk.seen
    talk.say("[[say two]]")
    for path, headers in ((f"/v1/events?after={mark}", {}), ("/v1/events", {"Last-Event-ID": str(mark)}),
                          ("/v1/events?after=0", {"Last-Event-ID": str(mark)})):
        again = Events(server, path, **headers)
        again.wait_for("prompt.done", talk.id)
        heard = [event["id"] for event in again.heard if event["sessionId"] == talk.id]
        assert heard == [event["id"] for event in server.events.heard if event["sessionId"] == talk.id and event["id"] > mark]
        again.close()


def test_stream_events_without_after_begins_now(server, make):
    fresh = Events(server, "/v1/events")
    eventually(lambda: fresh.connections)
    talk = make()
    assert fresh.wait_for("session.created")["sessionId"] == talk.id
    fresh.close()


def test_stream_events_says_reset_to_an_id_it_never_gave(server, talk):
    strange = Events(server, "/v1/events?after=999999999")
    reset = strange.wait_for("reset")
    assert reset["id"] < 999999999
    talk.say("[[say on we go]]")
    strange.wait_for("prompt.done", talk.id)
    strange.close()


def test_stream_events_sends_heartbeats(strict):
    stream = Events(strict)
    eventually(lambda: stream.parser.comments >= 3)
    stream.close()


def test_stream_events_to_clients_that_never_read_harm_nobody(server, talk):
    stuck = []
    for _ in range(20):
        line = socket.socket()
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        line.connect(("127.0.0.1", server.port))
        line.sendall(b"GET /v1/events?after=0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        stuck.append(line)
    began = time.monotonic()
    assert talk.say("[[say still quick]]")["output"] == "still quick"
    assert time.monotonic() - began < 5
    for line in stuck:
        line.close()


# ============================================================================
# TMUX. The driver.
# ============================================================================


@pytest.fixture(scope="module")
def tmux() -> Iterator[Any]:
    """A driver with a private tmux server of its own."""
    root = Path(tempfile.mkdtemp(prefix="ae-", dir="/tmp"))
    kept, os.environ["TMUX_TMPDIR"] = os.environ.get("TMUX_TMPDIR"), str(root)
    driver = aegis.Tmux("tmux", f"aegis-test-{os.getpid()}", aegis.Log("error"))
    driver.start()
    yield driver
    driver.close()
    subprocess.run(driver.argv("kill-server"), stderr=subprocess.DEVNULL)
    os.environ.pop("TMUX_TMPDIR") if kept is None else os.environ.update(TMUX_TMPDIR=kept)
    shutil.rmtree(root, ignore_errors=True)


def open_pane(tmux: Any, *program: str) -> Any:
    """Open a window with a program in it."""
    return tmux.open_window("test", uuid.uuid4().hex[:12], program or ("cat",))


AWKWARD_WORDS = ["it's", '"', "a;b", ";", "\\;", "\\", "\\\\", "#{pane_id}", "#(touch /tmp/x)", "$(x)", "$HOME", "${HOME}", "~", "~root",
                 "%1", "{", "}", "{ kill-server }", "-t", " ", "", "a  b", "tab\there", "ünï ☃ 👩‍💻", "'" * 50,
                 "x" * 10_000, "two\nlines", "a\r\nb\x1b[31m\x7f", "kill-server\nkill-server"]


@pytest.mark.parametrize("word", AWKWARD_WORDS, ids=lambda word: repr(word[:20]))
def test_a_word_passes_tmux_unchanged(tmux, word):
    for run in (tmux.run, lambda *commands: tmux._run_once(commands, 5.0)):
        run(("set-option", "-g", "@word", "x"), ("set-option", "-g", "@word", word))
        assert "\n".join(run(("show-options", "-gv", "@word"))) in (word, word + "\n")


def test_a_word_with_nul_is_refused_before_tmux_sees_it(tmux):
    with pytest.raises(aegis.TmuxError):
        tmux.run(("set-option", "-g", "@word", "a\0b"))
    assert tmux.run(("display-message", "-p", "here")) == ["here"]


def test_an_error_names_its_command(tmux):
    with pytest.raises(aegis.TmuxError) as failed:
        tmux.run(("kill-window", "-t", "@999999"))
    assert "kill-window" in str(failed.value) and "999999" in str(failed.value)
    assert tmux.run(("display-message", "-p", "fine")) == ["fine"]


def test_many_threads_get_their_own_answers(tmux):
    def ask(number: int) -> bool:
        return tmux.run(("display-message", "-p", f"n{number}")) == [f"n{number}"]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(400)))


def test_a_text_that_looks_like_the_protocol_is_text(tmux):
    for line in ("%end 1 2 3", "%begin 1 2 3", "%exit", "%output %1 x"):
        tmux.run(("set-option", "-g", "@word", line))
        assert tmux.run(("show-options", "-gv", "@word")) == [line]


def test_a_lost_control_client_is_replaced_and_nothing_is_missed(tmux):
    for _ in range(3):
        client = eventually(lambda: tmux.client)
        client.kill()
        eventually(lambda: tmux.run(("display-message", "-p", "one-shot")) == ["one-shot"])
        eventually(lambda: tmux.client not in (None, client) and tmux.error is None)
        assert tmux.run(("display-message", "-p", "control")) == ["control"]


def test_a_dead_pane_can_be_pasted_into_without_harm(tmux, tmp_path):
    pane = open_pane(tmux, "true")
    eventually(lambda: next(one for one in tmux.panes() if one.pane == pane.pane).dead)
    for _ in range(3):
        assert not tmux.type(pane.pane, [aegis.Stroke("boo"), aegis.Stroke("", ("Enter",))], tmp_path / "spool")
    assert any(one.pane == pane.pane for one in tmux.panes())
    tmux.close_window(pane.window)


def test_a_pane_is_found_again_by_its_tag(tmux):
    pane = open_pane(tmux)
    found = next(one for one in tmux.panes() if one.session == pane.session)
    assert (found.pane, found.window, found.pid, found.dead) == (pane.pane, pane.window, pane.pid, False)
    tmux.close_window(pane.window)
    assert all(one.pane != pane.pane for one in tmux.panes())


def test_a_hung_tmux_is_an_error_and_not_a_hang(tmp_path):
    hung = tmp_path / "tmux"
    hung.write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    hung.chmod(0o755)
    driver = aegis.Tmux(str(hung), "aegis-test-hung", aegis.Log("error"))
    with pytest.raises(aegis.TmuxError):
        driver.run(("display-message", "-p", "x"), timeout=0.1) if driver.client else driver._run_once([("list-panes",)], 0.1)


# ============================================================================
# EXITS. Tells at once when a process ends.
# ============================================================================


def test_the_end_of_a_process_is_told_once_and_at_once():
    exits = aegis.Exits()
    exits.start()
    told: List[int] = []
    running = [subprocess.Popen(["cat"], stdin=subprocess.PIPE) for _ in range(3)]
    for process in running:
        exits.watch(process.pid, lambda pid=process.pid: told.append(pid))
    running[1].kill()
    running[1].wait()
    eventually(lambda: told == [running[1].pid])
    exits.watch(running[1].pid, lambda: told.append(0))      # a process that is gone already
    eventually(lambda: told == [running[1].pid, 0])
    for process in (running[0], running[2]):
        process.kill()
        process.wait()
    eventually(lambda: sorted(told) == sorted([0, *(process.pid for process in running)]))
    exits.close()


# ============================================================================
# SCREENS. The text of a terminal -> what the agent is doing.
# ============================================================================

RULE = "─" * 100
FOOTER = "  ⏸ manual mode on · ? for shortcuts                              ◐ medium · /effort"
BUSY = "  ⏸ manual mode on · esc to interrupt"


def box(*above: str, inside: str = "❯ ", footer: str = FOOTER, rule: str = RULE) -> str:
    """Draw a screen with an input box."""
    return "\n".join([*above, "", rule, inside, RULE, footer])


def dialog(*lines: str, hint: str = " Esc to cancel · Tab to amend") -> str:
    """Draw a screen with a dialog at its bottom."""
    return "\n".join(["● Bash(touch x)", "", RULE, *lines, "", hint])


YES_NO = (" Do you want to proceed?", " ❯ 1. Yes", "   2. No")
TRUST = ("─" * 40 + "\n Accessing workspace:\n\n /tmp/x\n\n Quick safety check: Is this a project you created or one you trust?\n\n"
         "   1. Yes, I trust this folder\n ❯ 2. No, exit\n\n Enter to confirm · Esc to cancel")
SCREENS = {
    "blank": ("", "unknown"),
    "idle": (box(), "idle"),
    "idle with a title": (box(rule="─" * 60 + " fix the login ──"), "idle"),
    "idle after a turn": (box("● Done.", "", "✻ Brewed for 6s · done 7:44 PM"), "idle"),
    "idle after an interrupt": (box("❯ go on", "  ⎿  Interrupted · What should Claude do instead?"), "idle"),
    "working": (box("✶ Doodling… (2s · ↓ 29 tokens)", footer=BUSY), "working"),
    "working, old client": (box("✻ Leavening… (esc to interrupt)", footer="  ? for shortcuts"), "working"),
    "prose says esc to interrupt": (box("● Press esc to interrupt it.", "  esc to interrupt"), "idle"),
    "bullets": (box("● * one…", "  ✻ two…", "  · three…", "● four"), "idle"),
    "error in prose": (box("● Error: 529 overloaded. Rate limit reached. Your context window is 80 % full."), "idle"),
    "list in prose": (box("● Do you want to proceed?", "  ❯ 1. Yes", "    2. No", "  Esc to cancel"), "idle"),
    "trust in prose": (box("● Quick safety check: Is this a project you created or one you trust?", "  1. Yes", "  2. No, exit"), "idle"),
    "draft": (box(inside="❯ half a thought"), "idle"),
    "draft of a list": (box(inside="❯ 1. one\n  2. two"), "idle"),
    "permission, two rows": (dialog(*YES_NO), "permission_prompt"),
    "permission, three rows": (dialog(" Do you want to create w.txt?", " ❯ 1. Yes", "   2. Yes, and switch to accept edits", "   3. No"),
                               "permission_prompt"),
    "permission, four rows": (dialog(" Bash command", "   touch x", " Do you want to proceed?", " ❯ 1. Yes",
                                     "   2. Yes, and always allow access to /tmp from this project",
                                     "   3. Yes, and switch to auto mode", "   4. No"), "permission_prompt"),
    "trust": (TRUST, "trust"),
    "unknown dialog": (dialog(" This session is old. Resume from summary?", " ❯ 1. Resume from summary", "   2. Full session",
                              hint=" Enter to confirm · Esc to cancel"), "asking"),
    "not logged in": (box(footer="  Not logged in · Run /login"), "login"),
    "no service": ("Unable to connect to Anthropic services\nFailed to connect to api.anthropic.com: ENOTFOUND", "onboarding"),
}


@pytest.mark.parametrize("name", SCREENS)
def test_a_screen_is_read_for_what_it_is(name):
    text, wanted = SCREENS[name]
    reading = aegis.read_claude_screen(text)
    assert reading.kind == wanted, reading
    padded = aegis.read_claude_screen(text + "\n" * 20)
    assert padded.kind == wanted, "blank lines below change nothing"


def test_a_draft_is_told_and_an_empty_box_has_none():
    assert aegis.read_claude_screen(SCREENS["draft"][0]).draft == "half a thought"
    assert aegis.read_claude_screen(SCREENS["idle"][0]).draft == ""


def test_a_dialogs_options_are_told_by_label_with_the_cursor():
    options = aegis.read_claude_screen(TRUST).options
    assert [(option.label, option.selected) for option in options] == [("Yes, I trust this folder", False), ("No, exit", True)]


def test_selftest_prints_a_confusion_matrix_and_fails_on_a_misreading(tmp_path):
    for name, wanted in (("plain", "idle"), ("busy", "working")):
        (tmp_path / f"{name}.{wanted}.txt").write_text(SCREENS[{"plain": "idle", "busy": "working"}[name]][0], encoding="utf-8")
    good = run_aegis("selftest", "--screens", str(tmp_path))
    assert good.returncode == 0, good.stdout + good.stderr
    assert "idle" in good.stdout and "working" in good.stdout
    (tmp_path / "lie.working.txt").write_text(SCREENS["idle"][0], encoding="utf-8")
    bad = run_aegis("selftest", "--screens", str(tmp_path))
    assert bad.returncode == 1 and "lie" in bad.stdout
    assert run_aegis("selftest", "--screens", str(tmp_path / "nowhere")).returncode not in (0, 1)


# ============================================================================
# TRANSCRIPTS. An agent's JSONL -> answers, messages, tokens, cost.
# ============================================================================


def line(kind: str, content: Any, **more: Any) -> bytes:
    """Write one transcript line."""
    message = {"role": kind, "content": content, **more.pop("message", {})}
    return json.dumps({"type": kind, "timestamp": "2026-04-08T09:00:00.000Z", "message": message, **more}).encode() + b"\n"


def said(text: str, number: int, usage: Optional[Json] = None, model: str = "claude-sonnet-4-5", **more: Any) -> bytes:
    """Write one block of an assistant's message."""
    usage = usage or {"input_tokens": 10, "output_tokens": 5, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 2}
    return line("assistant", [{"type": "text", "text": text}], message={"id": f"msg{number}", "model": model, "usage": usage,
                                                                       "stop_reason": "end_turn"}, **more)


def books(*raw: bytes) -> Json:
    """Count the usage of some lines."""
    return aegis.count_usage(aegis.new_ledger(), [entry for one in raw for entry in aegis.parse_line(one)])


def test_usage_is_counted_once_for_each_message():
    once = aegis.token_usage(books(said("a", 1)))
    assert once == {"input": 10, "output": 5, "cacheRead": 3, "cacheWrite": 2}
    assert aegis.token_usage(books(said("a", 1), said("b", 1), said("c", 1))) == once
    assert aegis.token_usage(books(said("a", 1), said("b", 2)))["input"] == 20


def test_usage_that_grows_while_it_streams_counts_as_it_ended():
    assert aegis.token_usage(books(said("a", 1, {"output_tokens": 1}), said("b", 1, {"output_tokens": 9})))["output"] == 9


def test_what_is_not_the_agents_own_word_is_left_out():
    synthetic = line("assistant", [{"type": "text", "text": "API Error: 529"}], isApiErrorMessage=True,
                     message={"id": "e", "model": "<synthetic>", "usage": {"input_tokens": 9}})
    side = said("aside", 3, isSidechain=True)
    assert aegis.token_usage(books(synthetic, side))["input"] == 0
    assert not any(entry.kind == "text" for one in (synthetic, side) for entry in aegis.parse_line(one))


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b'"x"', b'{"type":"user"}', b'{"type":"user","message":null}',
                                 b'{"type":"assistant","message":{"content":[null,1,{"type":"text"}]}}', b"\xff\xfe",
                                 b'{"type":"what-is-new","message":{"content":"x"}}'])
def test_a_line_that_nobody_knows_is_skipped(raw):
    assert not any(entry.kind in ("prompt", "tool", "result") for entry in aegis.parse_line(raw))


def test_cost_is_priced_or_plainly_unknown():
    million = {"input_tokens": 1_000_000, "output_tokens": 1_000_000}
    assert aegis.cost_usd(books(said("a", 1, million))) == pytest.approx(18.0)
    assert aegis.cost_usd(books(said("a", 1, million, model="who-knows-9"))) is None
    assert aegis.cost_usd(aegis.new_ledger()) == 0


def test_a_transcript_is_read_on_at_the_end_of_whole_lines(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"one\ntwo\nthr")
    offset, lines = aegis.read_new_lines(str(path), 0)
    assert (offset, lines) == (8, [b"one", b"two"])
    with path.open("r+b") as file:                  # what was read is never read again
        file.write(b"ONE\nTWO\n")
        file.seek(0, 2)
        file.write(b"ee\nfour\n")
    offset, lines = aegis.read_new_lines(str(path), offset)
    assert (offset, lines) == (19, [b"three", b"four"])
    assert aegis.read_new_lines(str(path), offset) == (offset, [])


def test_a_transcript_that_shrank_or_went_away_is_survived(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"one\ntwo\n")
    path.write_bytes(b"x\n")
    offset, lines = aegis.read_new_lines(str(path), 8)
    assert offset <= 2 and lines in ([], [b"x"])
    assert aegis.read_new_lines(str(tmp_path / "gone"), 8) == (8, [])


def test_messages_come_from_the_end_and_each_is_a_place_to_go_on_from(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"".join(said(f"answer {number} " + "x" * 500, number) for number in range(500)))
    last = aegis.read_messages([str(path)], 3, None)
    assert [message["text"].split()[1] for message in last] == ["497", "498", "499"]
    part, offset = map(int, last[0]["id"].split(".")[0].split("-"))
    assert [message["id"] for message in aegis.read_messages([str(path)], 10, (part, offset))] == [one["id"] for one in last[1:]]
    assert len({message["id"] for message in aegis.read_messages([str(path)], 500, None)}) == 500
