"""Attacks on a federation of real processes: a stranger, a neighbour on the machine, a registered
client that is bad, and a greedy server. The table in docs/federation.md names these tests."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node as NodeProto
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedvpa.checkpoint import load_checkpoint
from fedvpa.network.node import read_key
from tests.conftest import write_groups
from tests.e2e.federation import Federation
from tests.e2e.test_federation import pairs_of

pytestmark = pytest.mark.slow

ROUNDS = 40
TRAINING: dict[str, Any] = {
    "method": "fedvpl", "prior": {"kind": "gaussian"}, "model": {"inputs": 6, "latent": 3},
    "prototypes": {"modes": 2},
    "federation": {"rounds": ROUNDS, "local_steps": 4, "validate_every": 99},
}  # fmt: skip


def training(model: Path, rounds: int = ROUNDS) -> dict[str, Any]:
    """Settings of a federation that lasts as long as an attack takes."""
    federation = TRAINING["federation"] | {"rounds": rounds}
    features = {"backbone": str(model), "layer": 2, "dtype": "float32"}
    return TRAINING | {"federation": federation, "features": features}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Federation]:
    """A server that goes on for as long as it is looked at, and three honest clients."""
    folder = tmp_path_factory.mktemp("attacked")
    own = pairs_of(write_groups(folder / "data"), 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDVPA_CACHE", str(folder / "cache"))
        patient = {"min_clients": 2, "min_replies": 2, "grace": 1.0, "timeout": 10.0}
        with Federation(folder / "f", own, training(tiny_model, 100_000), **patient) as running:
            running.start()
            running.wait_for("round 1 of")
            yield running
            assert running.server is not None
            assert running.server.poll() is None, "the attacks have ended the server"
            before = running.said().count(" round ")
            time.sleep(15)
            assert running.said().count(" round ") > before, "the attacks have stopped the rounds"


def address(federation: Federation) -> tuple[str, int]:
    """Where the server listens."""
    port = re.search(r"^port: (\d+)", (federation.folder / "server.yaml").read_text(), re.M)
    assert port is not None
    return "127.0.0.1", int(port[1])


def stranger(federation: Federation) -> httpx.Client:
    """Whoever has the public certificate and the address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(str(federation.folder / "certificates" / "ca.crt"))
    host, port = address(federation)
    return httpx.Client(base_url=f"https://{host}:{port}", verify=context, timeout=20)


def peak(process: subprocess.Popen[bytes]) -> int:
    """The most memory that a process has had, in MiB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) // 1024


def flower(*command: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Flower's own command line, as a stranger has it."""
    environment = os.environ | {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0"}
    program = [sys.executable, "-c", "from flwr.cli.app import app; app()", *command]
    return subprocess.run(
        program, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def connection(folder: Path, host: str, port: int, certificate: Path) -> Path:
    """A home for Flower's command line that knows a SuperLink."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(
        f'[superlink]\ndefault = "it"\n\n[superlink.it]\naddress = "{host}:{port}"\n'
        f'root-certificates = "{certificate}"\n'
    )
    return folder


# ------------------------------------------------------------------------------------ a stranger


def test_a_stranger_reaches_nothing_but_the_fleet_api(federation: Federation) -> None:
    """Control and Runtime, with which an app is run on every machine, are not on the network."""
    from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

    paths = {path for _, path in PROTOBUF_REQUEST_TYPES}
    others = [p for p in paths if "/control/" in p or "/runtime/" in p]
    assert len(others) > 40
    more = ["/", "/docs", "/openapi.json", "/health", "/v1/fleet/../control/list-runs",
            "/v1/fleet//pull-messages", "/v1/fleet/register-node", "/v1/fleet/get-fab"]  # fmt: skip
    with stranger(federation) as client:
        for path in [*others, *more]:
            answer = client.post(path, headers={"content-type": "application/protobuf"})
            assert answer.status_code == 404, path
            assert client.get(path).status_code == 404, path
        assert client.get("/v1/fleet/pull-messages").status_code == 404


def test_a_stranger_runs_no_app(federation: Federation, tmp_path: Path) -> None:
    """`flwr run` of one's own app, as it was done to version 0.1, with nothing but `ca.crt`."""
    host, port = address(federation)
    home = connection(tmp_path / "home", host, port, federation.folder / "certificates" / "ca.crt")
    mark = tmp_path / "was-run"
    app = evil_app(tmp_path / "app", mark)
    for command in (["run", str(app), "it"], ["ls", "it"], ["supernode", "list", "it"]):
        done = flower(*command, home=home)
        assert done.returncode != 0, done.stdout
        assert "client" not in done.stdout
    assert not mark.exists()


def test_a_stranger_makes_the_server_hold_nothing(federation: Federation) -> None:
    """600 MB without a login: turned away before they are read, however they are announced."""
    assert federation.server is not None
    before = peak(federation.server)
    own = signature(generate_key_pairs()[0])

    def endless() -> Iterator[bytes]:
        for _ in range(600):
            yield bytes(1 << 20)

    for headers in ({}, own, {"content-length": str(600 << 20)}):
        with stranger(federation) as client:
            try:
                answer = client.post("/v1/fleet/push-object", content=endless(), headers=headers)
                assert answer.status_code in (401, 413)
            except httpx.TransportError:
                pass  # the server has closed the connection while it was being written to
    assert peak(federation.server) < before + 100


def test_a_stranger_that_says_nothing_is_not_waited_for(federation: Federation) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(str(federation.folder / "certificates" / "ca.crt"))
    # one that does not even begin TLS, and two that do
    lines: list[socket.socket] = [socket.create_connection(address(federation))]
    lines[0].settimeout(30)
    for begun in (b"", b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: x\r\n"):
        line = context.wrap_socket(
            socket.create_connection(address(federation)), server_hostname="127.0.0.1"
        )
        line.sendall(begun)
        line.settimeout(30)
        lines.append(line)
    for line in lines:
        assert line.recv(1) == b""  # closed by the server
        line.close()


def test_a_stranger_cannot_connect_without_tls_or_by_another_key(federation: Federation) -> None:
    host, port = address(federation)
    with pytest.raises(httpx.TransportError):
        httpx.post(f"http://{host}:{port}/v1/fleet/pull-messages")
    private, public = generate_key_pairs()
    with as_node(federation, private) as client, pytest.raises(httpx.HTTPStatusError) as refused:
        client.ActivateNode(
            ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=30)
        )
    assert refused.value.response.status_code == 401


# ----------------------------------------------------------------------------------- a neighbour


def test_a_neighbour_finds_no_port_of_a_client(federation: Federation) -> None:
    """Clients listen nowhere and start nothing; the server listens on its one port."""
    _, port = address(federation)
    assert federation.server is not None
    assert listening(federation.server.pid) == {port}
    for client in federation.clients.values():
        assert listening(client.pid) == set()
        assert children(client.pid) == []
    assert children(federation.server.pid) == []


def test_a_neighbour_reads_no_secret(federation: Federation) -> None:
    """Of what is not public, nothing is readable for others, and nothing is on a command line."""
    for process in (federation.server, *federation.clients.values()):
        assert process is not None
        line = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
        assert len([part for part in line if part]) == 5  # python -m fedvpa.cli.main client DIR
    public = ("ca.crt", "client.yaml")
    public += ("client.out", "pairs.jsonl")  # written by this test
    private = [path for path in federation.folder.glob("clients/**/*") if path.name not in public]
    private += [federation.folder / "certificates" / "server.key"]
    for path in private:
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert {"node.key", "client.log", "pairs.sha256"} <= {p.name for p in private}
    for home in (*federation.homes, federation.run):
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
    caches = list((federation.folder.parent / "cache").glob("features.sqlite*"))
    assert caches
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in caches)


def test_a_client_that_is_killed_leaves_nothing_behind(federation: Federation) -> None:
    before = set(Path("/tmp").glob("fedvpa-*"))
    federation.kill(federation.clients["client-2"])
    federation.start_client("client-2")
    time.sleep(1)
    assert set(Path("/tmp").glob("fedvpa-*")) == before


def listening(pid: int) -> set[int]:
    """TCP ports that a process listens on."""
    inodes = set()
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        found = (
            re.fullmatch(r"socket:\[(\d+)\]", os.readlink(handle)) if handle.is_symlink() else None
        )
        inodes |= {found[1]} if found else set()
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# --------------------------------------------------------------------------- a registered client


def as_node(federation: Federation, key: Any) -> FleetHttpClient:
    """A caller of the Fleet API with a key."""
    host, port = address(federation)
    authority = (federation.folder / "certificates" / "ca.crt").read_bytes()
    signs = NodeAuthHttpInterceptor(key, key.public_key())
    return FleetHttpClient.from_server_address(f"{host}:{port}", False, authority, [signs])


def signature(key: Any) -> dict[str, str]:
    """Headers of a request that are signed by a key."""
    request = httpx.Request("POST", "https://x")
    context = ProtobufRequestContext("", ActivateNodeRequest(), request)
    NodeAuthHttpInterceptor(key, key.public_key()).intercept(context, lambda _: httpx.Response(200))
    return {k: v for k, v in request.headers.items() if k not in ("host", "content-length")}


def node_of(key: Any) -> int:
    """The number by which the server knows a key."""
    import hashlib

    return int.from_bytes(hashlib.sha256(public_key_to_bytes(key.public_key())).digest()[:8]) >> 1


def test_a_registered_client_speaks_for_itself_alone(federation: Federation) -> None:
    """With its own valid key: others' messages, others' answers, too many, too large."""
    keys = [read_key(home / "node.key") for home in federation.homes]
    mine, other = (NodeProto(node_id=node_of(key)) for key in keys[:2])
    with as_node(federation, keys[0]) as client:

        def status(call: Any, request: Any) -> int:
            with pytest.raises(httpx.HTTPStatusError) as refused:
                call(request)
            code: int = refused.value.response.status_code
            return code

        assert status(client.PullMessages, PullMessagesRequest(node=other)) == 401
        TaskIdentity.run_id = TaskIdentity.task_id = 1
        for about in (other.node_id, mine.node_id):
            TaskIdentity.node_id = about
            asked = Message(RecordDict(), about, "query", ttl=60)
            asked.metadata.__dict__["_message_id"] = "0" * 64
            forged = Message(RecordDict({"x": ConfigRecord({"blob": b""})}), reply_to=asked)
            forged.metadata.__dict__["_message_id"] = forged.object_id
            request = PushMessagesRequest(
                node=mine,
                messages_list=[message_to_proto(remove_content_from_message(forged))],
                message_object_trees=[get_object_tree(forged)],
            )
            assert status(client.PushMessages, request) == 403
        part = PullObjectRequest(node=mine, run_id=1, object_id="0" * 64)
        assert status(client.PullObject, part) == 403
        more = PushObjectRequest(node=mine, run_id=1, object_id="0" * 64, object_content=b"x")
        assert status(client.PushObject, more) == 403
    assert federation.server is not None
    before = peak(federation.server)
    signs = signature(keys[0]) | {"content-type": "application/protobuf"}
    with stranger(federation) as client_:
        for path in ("push-object", "pull-messages"):
            try:
                answer = client_.post(f"/v1/fleet/{path}", content=bytes(200 << 20), headers=signs)
                assert answer.status_code == 413
            except httpx.TransportError:
                pass
        with ThreadPoolExecutor(16) as many:
            jobs = [
                many.submit(client_.post, "/v1/fleet/pull-messages", headers=signs)
                for _ in range(400)
            ]
            often = [job.result() for job in jobs]
    assert 429 in {answer.status_code for answer in often}
    assert peak(federation.server) < before + 150
    time.sleep(2)  # the client whose key this is may speak again


@pytest.mark.parametrize("modes", [("deep", "huge"), ("shape", "text")])
def test_bad_clients_are_named_and_left_out_and_the_rounds_go_on(
    modes: tuple[str, str], pair_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Deep JSON, an endless shape, 200 MB and terminal codes in place of an update."""
    own = pairs_of(pair_file, 5)
    settings = {"min_replies": 3, "grace": 1.0, "timeout": 10.0}
    with Federation(tmp_path / "f", own, training(tiny_model, 8), **settings) as federation:
        federation.start_server()
        for name in ("client-0", "client-1", "client-2"):
            federation.start_client(name)
        for name, mode in zip(("client-3", "client-4"), modes):
            home = federation.folder / "clients" / name
            federation.launch_module("tests.e2e.bad_client", [mode, str(home)], home / "client.out")
        federation.wait_for("'client-3' is connected")
        federation.wait_for("'client-4' is connected")
        assert federation.server is not None
        before = peak(federation.server)
        # the server is killed in between: who was caught is remembered
        federation.wait_for("round 3 of")
        grown = peak(federation.server) - before
        federation.kill(federation.server)
        federation.start_server()
        assert federation.wait(200) == 0, federation.out()
        said = federation.said()
    result = json.loads((federation.run / "federation.json").read_text())
    out = {"client-3", "client-4"} if "huge" not in modes else {"client-3"}
    assert set(result["left_out"]) == out
    assert "train: the reply of 'client-3' does not count" in said
    assert grown < 150
    assert "\x1b" not in said
    assert said.count("finished: ") == 1
    assert load_checkpoint(federation.run / "checkpoint.safetensors").finished


def test_a_client_that_deviates_in_secure_sums_is_named_and_left_out(
    pair_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    own = pairs_of(pair_file, 5)
    given = training(tiny_model, 2) | {"prior": {"kind": "components", "start_round": 99}}
    settings = {"min_clients": 4, "min_replies": 4, "timeout": 40.0}
    with Federation(tmp_path / "f", own, given, secure=True, **settings) as federation:
        federation.start_server()
        for name in list(own)[:4]:
            federation.start_client(name)
        home = federation.folder / "clients" / "client-4"
        federation.launch_module("tests.e2e.bad_client", ["masked", str(home)], home / "client.out")
        assert federation.wait(200) == 0, federation.out()
        said = federation.said()
    assert "the reply of 'client-4' does not count: not an answer to this stage" in said
    assert json.loads((federation.run / "federation.json").read_text())["left_out"] == ["client-4"]


# ------------------------------------------------------------------------------- a greedy server


def evil_app(folder: Path, mark: Path) -> Path:
    """An app whose parts leave a mark wherever they run, and send back what they find."""
    code = f"open({str(mark)!r}, 'a').write(__name__)\n"
    (folder / "evil").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n\n'
        '[project]\nname = "evil"\nversion = "1.0.0"\ndescription = "evil"\nlicense = "MIT"\n'
        'dependencies = []\n\n[tool.hatch.build.targets.wheel]\npackages = ["evil"]\n\n'
        '[tool.flwr.app]\npublisher = "evil"\n\n[tool.flwr.app.components]\n'
        'serverapp = "evil.server:app"\nclientapp = "evil.client:app"\n\n[tool.flwr.app.config]\n'
        'out = ""\n'
    )
    (folder / "evil" / "__init__.py").write_text("")
    (folder / "evil" / "client.py").write_text(
        f"from flwr.clientapp import ClientApp\n{code}app = ClientApp()\n"
        "@app.query()\ndef query(message, context):\n    " + code
    )
    (folder / "evil" / "server.py").write_text(
        "import json, time\nfrom flwr.app import ConfigRecord, Message, RecordDict\n"
        "from flwr.serverapp import ServerApp\napp = ServerApp()\n"
        "@app.main()\ndef main(grid, context):\n    told = []\n"
        "    for kind in ('query', 'train', 'evaluate', 'query.other'):\n"
        "        content = RecordDict({'fedvpa': ConfigRecord({'blob': b'x'})})\n"
        "        nodes = grid.get_node_ids()\n"
        "        sent = [Message(content, node, kind, ttl=30) for node in nodes]\n"
        "        for reply in grid.send_and_receive(sent, timeout=20):\n"
        "            told.append(str(reply.error if reply.has_error() else reply.content))\n"
        "    open(context.run_config['out'], 'w').write(json.dumps(told))\n"
    )
    return folder


def test_a_client_of_a_superlink_that_others_run_executes_nothing_of_it(
    pair_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Flower's own SuperLink, whose operator runs an app of his own first, and ours then: clients
    answer ours and execute nothing."""
    with Federation(tmp_path / "f", pairs_of(pair_file, 3), training(tiny_model, 2)) as federation:
        folder = federation.folder
        host, port = address(federation)
        home = connection(tmp_path / "home", host, port, folder / "certificates" / "ca.crt")
        link = federation.launch_module(
            "flwr.superlink.cli.flower_superlink",
            ["--host", host, "--port", str(port), "--enable-supernode-auth", "--ssl-certfile",
             str(folder / "certificates/server.crt"), "--ssl-keyfile",
             str(folder / "certificates/server.key"), "--ssl-ca-certfile",
             str(folder / "certificates/ca.crt"), "--disable-runtime-dependency-installation"],
            tmp_path / "link.out", call="flower_superlink", FLWR_HOME=str(home),
            FLWR_TELEMETRY_ENABLED="0",
        )  # fmt: skip
        wait_for_port(host, port, link)
        for client in federation.homes:
            key = folder / "keys" / f"{client.name}.pub"
            done = flower("supernode", "register", str(key), "it", home=home)
            assert done.returncode == 0, done.stdout + done.stderr
            federation.start_client(client.name)
        for client in federation.homes:
            wait_for_text(client / "client.out", "is connected")
        mark, out = tmp_path / "was-run", tmp_path / "told.json"
        app = evil_app(tmp_path / "app", mark)
        begin = ["run", str(app), "it", "--run-config", f'out="{out}"']
        assert flower(*begin, home=home).returncode == 0
        wait_for_text(out, "]", 120)
        told = json.loads(out.read_text())
        assert len(told) == 12
        assert not mark.exists()  # not even the ServerApp imports the ClientApp
        assert all(len(one) < 300 and "pairs" not in one and str(folder) not in one for one in told)
        ours = ["run", str(folder / "app"), "it", "--run-config",
                f'settings="{folder / "server.yaml"}"']  # fmt: skip
        assert flower(*ours, home=home).returncode == 0
        wait_for_text(federation.run / "federation.json", "rounds", 180)
    assert load_checkpoint(federation.run / "checkpoint.safetensors").finished


def wait_for_port(host: str, port: int, process: subprocess.Popen[bytes]) -> None:
    """Until somebody listens."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert process.poll() is None
        with socket.socket() as probe:
            if probe.connect_ex((host, port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError("nothing listens")


def wait_for_text(path: Path, text: str, seconds: float = 60) -> None:
    """Until a file holds a text."""
    end = time.monotonic() + seconds
    while not (path.is_file() and text in path.read_text()):
        assert time.monotonic() < end, path.read_text() if path.is_file() else f"no {path}"
        time.sleep(0.2)
