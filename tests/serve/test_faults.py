"""What goes wrong around a server: it is killed, its folder or disk fails, clients drop. Nothing is lost or leaks."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import psutil
import pytest

from steer.direction import MAX_BYTES, digest
from steer.files import write_file
from steer.serve.audit import verify
from tests import models
from tests.serve.rules import POLICY, bearer
from tests.servers import Server, outlives_clients, receipt, text
from tests.waiting import eventually

LONG = {"max_tokens": 400, "ignore_eos": True, "temperature": 0, "stream": True}
FILES = [models.direction(models.tiny("llama"), seed=seed).to_bytes() for seed in (31, 32)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "directions"
    made.mkdir()
    write_file(made / "refusal.safetensors", FILES[0])
    return made


@pytest.fixture(scope="module")
def lasting(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for all faults that it must survive; `refusal` is served."""
    made = tmp_path_factory.mktemp("faults") / "directions"
    made.mkdir()
    write_file(made / "refusal.safetensors", FILES[0])
    with Server(str(tiny_folder), "--directions", str(made), directions=made) as server:
        yield server


def health(server: Server) -> dict[str, object]:
    return dict(server.client.get("/health").json())


def served(server: Server) -> str:
    return str(receipt(server.complete(steer="refusal"))[0]["digest"])


def quiet(server: Server) -> bool:
    told = server.client.get("/metrics").text
    return health(server)["in_flight"] == 0 and "steer_rows_in_use 1.0" in told


# -- the server ends -------------------------------------------------------------------------------------------------


def test_a_server_that_is_told_to_end_serves_its_streams_to_their_end(tiny_folder: Path, folder: Path) -> None:
    with Server(str(tiny_folder), "--directions", str(folder), directions=folder) as server:
        whole = text(server.complete("hello", steer="refusal", **LONG | {"stream": False}))
        body = {"model": server.model_name, "prompt": "hello", "steer": "refusal", **LONG}
        with server.client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            got = next(lines) + "\n"
            server.process.send_signal(signal.SIGTERM)
            got += "\n".join(lines)
        chunks = [json.loads(line[6:]) for line in got.splitlines() if line.startswith("data: {")]
        assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == whole
        assert got.rstrip().endswith("data: [DONE]")
        assert server.process.wait(timeout=120) == 0
        assert "Traceback" not in server.log
        assert "leaked" not in server.log


def test_what_a_killed_server_had_is_there_when_it_starts_again(
    tiny_folder: Path, folder: Path, tmp_path: Path
) -> None:
    """Directions, policy and audit chain; the line that it was writing is kept as a torn one."""
    log, policy = tmp_path / "audit.jsonl", tmp_path / "policy.toml"
    policy.write_text(POLICY)
    options = [str(tiny_folder), "--directions", str(folder), "--policy", str(policy), "--audit", str(log)]
    with Server(*options, directions=folder) as server:
        name = server.client.get("/v1/models", headers=bearer("all")).json()["data"][0]["id"]
        ask = {"model": name, "prompt": "hello", "temperature": 0, "steer": "second"}
        put = server.client.put("/v1/directions/second", content=FILES[1], headers=bearer("all"))
        assert put.status_code == 200
        first = text(server.client.post("/v1/completions", json=ask, headers=bearer("all")))
        body = {"model": name, "prompt": "hello", "steer": "refusal", **LONG}
        with server.client.stream("POST", "/v1/completions", json=body, headers=bearer("all")) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.kill()
            with pytest.raises(httpx.TransportError):
                list(lines)
        server.process.wait()
    with log.open("ab") as file:
        file.write(b'{"time":"half of a li')
    with Server(*options, directions=folder) as server:
        assert (health(server)["audit"], health(server)["policy"]) == ("ok", "ok")
        listed = server.client.get("/v1/directions", headers=bearer("all")).json()["data"]
        assert {card["id"]: card["digest"] for card in listed} == {
            "refusal": digest(FILES[0]),
            "second": digest(FILES[1]),
        }
        assert text(server.client.post("/v1/completions", json=ask, headers=bearer("all"))) == first
        over = ask | {"steer": "refusal=1.5"}
        assert server.client.post("/v1/completions", json=over, headers=bearer("reader")).status_code == 403
    report = verify([log])
    assert not report.problems
    assert any("a crash or a full disk" in note for note in report.notes)


# -- the folder ------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_gone_shows_and_serves_on_until_it_is_back(lasting: Server) -> None:
    folder = lasting.directions
    assert folder
    aside = folder.with_name("aside")
    assert health(lasting)["folder"] == "ok"
    folder.rename(aside)
    eventually(lambda: health(lasting)["folder"] == "unreadable")
    assert served(lasting) == digest(FILES[0])
    assert lasting.client.put("/v1/directions/new", content=FILES[1]).status_code == 507
    assert served(lasting) == digest(FILES[0])
    shutil.copytree(aside, folder)
    shutil.rmtree(aside)
    eventually(lambda: health(lasting)["folder"] == "ok")
    write_file(folder / "refusal.safetensors", FILES[1])
    eventually(lambda: served(lasting) == digest(FILES[1]))
    write_file(folder / "refusal.safetensors", FILES[0])
    eventually(lambda: served(lasting) == digest(FILES[0]))
    lasting.client.delete("/v1/directions/new")
    eventually(lambda: quiet(lasting))


@pytest.mark.parametrize("kind", ["half", "dangling", "loop", "huge", "pipe", "folder"])
def test_what_is_no_file_shows_with_its_reason_and_the_old_version_serves_on(lasting: Server, kind: str) -> None:
    assert lasting.directions
    path = lasting.directions / "refusal.safetensors"
    path.unlink() if kind != "half" else None
    if kind == "half":
        path.write_bytes(FILES[1][:500])
    elif kind == "dangling":
        path.symlink_to(path.with_name("nowhere"))
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(MAX_BYTES + 1)  # sparse
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    try:
        eventually(lambda: health(lasting)["failed_directions"] == ["refusal"])
    finally:
        path.rmdir() if kind == "folder" else path.unlink()
        write_file(path, FILES[0])
    eventually(lambda: health(lasting)["failed_directions"] == [])
    assert served(lasting) == digest(FILES[0])


def test_links_and_new_names_are_followed(lasting: Server) -> None:
    folder = lasting.directions
    assert folder
    elsewhere = folder.with_name("elsewhere.bin")
    elsewhere.write_bytes(FILES[1])
    (folder / "linked.safetensors").symlink_to(elsewhere)
    eventually(lambda: known(lasting, "linked"))
    assert receipt(lasting.complete(steer="linked"))[0]["digest"] == digest(FILES[1])
    (folder / "linked.safetensors").rename(folder / "renamed.safetensors")
    eventually(lambda: known(lasting, "renamed") and not known(lasting, "linked"))
    assert lasting.client.delete("/v1/directions/renamed").status_code == 200
    assert elsewhere.exists(), "the link goes, not what it points to"
    eventually(lambda: quiet(lasting))


def known(server: Server, name: str) -> bool:
    return server.client.get(f"/v1/directions/{name}").status_code == 200


def test_a_disk_that_is_full_refuses_what_is_new_and_keeps_what_is_there(
    tiny_folder: Path, folder: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands for the disk: writes fail as they do on a full one."""
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(FILES[0]) // 2},) * 2);"
        "from steer.cli import main; sys.argv = ['steer', *sys.argv[1:]]; main()"
    )
    command = [sys.executable, "-c", program, "serve", "--backend", "transformers"]
    with Server(str(tiny_folder), "--directions", str(folder), directions=folder, command=command) as server:
        before = sorted(folder.iterdir())
        refused = server.client.put("/v1/directions/refusal", content=FILES[1])
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage")
        assert sorted(folder.iterdir()) == before, "no part of a file is left"
        assert served(server) == digest(FILES[0])
        assert health(server)["failed_directions"] == ["refusal"]
        eventually(lambda: quiet(server))


def test_a_folder_that_is_read_only_is_read(tiny_folder: Path, folder: Path) -> None:
    # root writes wherever it likes, but for this capability
    program = (
        "import ctypes, os, sys; CAPBSET_DROP, DAC_OVERRIDE = 24, 1;"
        "ctypes.CDLL(None).prctl(CAPBSET_DROP, DAC_OVERRIDE, 0, 0, 0);"
        "os.execv(sys.executable, [sys.executable, '-m', 'steer', *sys.argv[1:]])"
    )
    command = [sys.executable, "-c", program, "serve", "--backend", "transformers"]
    folder.chmod(0o555)
    try:
        with Server(str(tiny_folder), "--directions", str(folder), directions=folder, command=command) as server:
            for answer in (
                server.client.put("/v1/directions/refusal", content=FILES[1]),
                server.client.put("/v1/directions/new", content=FILES[1]),
                server.client.delete("/v1/directions/refusal"),
            ):
                assert (answer.status_code, answer.json()["error"]["code"]) == (507, "storage"), answer.text
                assert "Permission denied" in answer.json()["error"]["message"]
            assert served(server) == digest(FILES[0])
            assert health(server)["folder"] == "ok", "it can be read"
            folder.chmod(0o755)
            assert server.client.put("/v1/directions/refusal", content=FILES[1]).status_code == 200
            assert served(server) == digest(FILES[1])
            assert server.client.delete("/v1/directions/new").status_code == 404, "it left nothing behind"
            eventually(lambda: quiet(server))
    finally:
        folder.chmod(0o755)


def test_a_slow_disk_holds_up_no_request(tiny_folder: Path, tmp_path: Path) -> None:
    folder, shim, disk = tmp_path / "slow", tmp_path / "slow_disk.so", tmp_path / "disk"
    folder.mkdir()
    disk.touch()
    write_file(folder / "refusal.safetensors", FILES[0])
    source = Path(__file__).with_name("slow_disk.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, source, "-ldl"], check=True)
    command = ["env", f"LD_PRELOAD={shim}", f"SLOW_UNTIL={disk}"]
    command += [sys.executable, "-m", "steer", "serve", "--backend", "transformers"]
    with (
        Server(str(tiny_folder), "--directions", str(folder), directions=folder, command=command) as server,
        ThreadPoolExecutor(1) as beside,
        ExitStack() as at_end,
    ):
        at_end.callback(disk.touch)
        plain = text(server.complete())
        kind = {"content-type": "application/octet-stream"}
        url = f"{server.url}/v1/directions/refusal"
        disk.unlink()
        put = beside.submit(httpx.put, url, content=FILES[1], headers=kind, timeout=1500)
        for _ in range(5):
            assert served(server) == digest(FILES[0])
            assert text(server.complete()) == plain
            assert health(server)["status"] == "ok"
            assert server.client.get("/v1/directions").status_code == 200
            assert not put.done(), "all of that came before the disk had written"
        disk.touch()
        assert put.result().status_code == 200
        assert served(server) == digest(FILES[1])
        disk.unlink()
        write_file(folder / "refusal.safetensors", FILES[0])
        for _ in range(5):
            assert served(server) == digest(FILES[1]), "it is being read"
        disk.touch()
        eventually(lambda: served(server) == digest(FILES[0]))
        eventually(lambda: quiet(server))


def test_two_servers_on_one_folder_agree(lasting: Server, tiny_folder: Path) -> None:
    folder = lasting.directions
    with Server(str(tiny_folder), "--directions", str(folder), directions=folder) as second:
        assert second.client.put("/v1/directions/refusal", content=FILES[1]).status_code == 200
        eventually(lambda: served(lasting) == digest(FILES[1]))
        assert lasting.client.put("/v1/directions/refusal", content=FILES[0]).status_code == 200
        eventually(lambda: served(second) == digest(FILES[0]))
        assert served(lasting) == digest(FILES[0])


# -- clients ---------------------------------------------------------------------------------------------------------


def test_a_thousand_connections_that_drop_leave_nothing(lasting: Server) -> None:
    process = psutil.Process(lasting.process.pid)
    lasting.complete(steer="refusal")
    eventually(lambda: quiet(lasting))
    fds, threads = process.num_fds(), process.num_threads()
    body = json.dumps({"model": lasting.model_name, "prompt": "hello", "steer": "refusal", **LONG}).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    sockets = []
    for number in range(1000):
        opened = socket.create_connection(("127.0.0.1", lasting.port), timeout=30)
        if number % 4 == 1:
            opened.sendall(request)
        elif number % 4 == 2:
            opened.sendall(request + b"Content-Length: 99999\r\n\r\n" + body)
        elif number % 20 == 3:
            opened.sendall(request + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        sockets.append(opened)
    assert health(lasting)["status"] == "ok"
    for opened in sockets:
        opened.close()
    eventually(lambda: quiet(lasting), 60)
    eventually(lambda: process.num_fds() <= fds + 5, 30)
    assert process.num_threads() <= threads + 5
    assert served(lasting) == digest(FILES[0])
    assert "Traceback" not in lasting.log


def test_clients_that_do_not_read_hold_up_nobody_and_lose_nothing(lasting: Server) -> None:
    """Answers that are larger than what sockets take in, one of which is read at last and one never."""
    process = psutil.Process(lasting.process.pid)
    ask = {"prompt": "hello", "steer": "refusal", "n": 16, "logprobs": 5}
    alone = [choice["text"] for choice in lasting.complete(**ask | LONG | {"stream": False}).json()["choices"]]
    body = json.dumps({"model": lasting.model_name, **ask, **LONG}).encode()
    before = process.memory_info().rss
    with ExitStack() as opened:
        readers = [opened.enter_context(closing(small_socket(lasting.port))) for _ in range(2)]
        for reader in readers:
            reader.sendall(posted(body))
        for _ in range(20):
            assert served(lasting) == digest(FILES[0])
        eventually(lambda: health(lasting)["in_flight"] == 0, 60)  # made to their end, they wait for who asked
        assert process.memory_info().rss - before < 64 << 20
        raw = b"".join(iter(lambda: readers[0].recv(65536), b""))
        assert len(raw) > 2 << 20, "or the sockets would have taken it in"
        said = [""] * 16
        for line in raw.decode().splitlines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    said[choice["index"]] += choice["text"]
        assert said == alone
        assert b"data: [DONE]" in raw
    eventually(lambda: quiet(lasting), 30)
    assert served(lasting) == digest(FILES[0])
    assert "Traceback" not in lasting.log


@pytest.mark.parametrize(("drain", "signals"), [("1", 1), ("300", 2)])
def test_what_is_ended_as_the_server_ends_is_told(tiny_folder: Path, folder: Path, drain: str, signals: int) -> None:
    audit = folder.parent / "audit.jsonl"
    options = [str(tiny_folder), "--directions", str(folder), "--drain", drain, "--audit", str(audit)]
    with Server(*options, directions=folder) as server, ThreadPoolExecutor() as pool:
        body = {"model": server.model_name, "prompt": "hello", "steer": "refusal", **LONG, "n": 64}
        asked = [
            pool.submit(httpx.post, f"{server.url}/v1/completions", json=body | {"stream": stream}, timeout=60)
            for stream in (True, False)
        ]
        eventually(lambda: "steer_steered_running 2.0" in server.client.get("/metrics").text)
        eventually(lambda: health(server)["in_flight"] == 128)
        for _ in range(signals):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        streamed, whole = (each.result() for each in asked)
        assert server.process.wait(timeout=120) == 0
        assert "Traceback" not in server.log
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert '"code":"stopping"' in streamed.text
    assert (whole.status_code, whole.json()["error"]["code"]) == (503, "stopping")
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    assert [line["outcome"] for line in lines if line["event"] == "ended"] == ["aborted"] * 2
    assert not verify([audit]).problems


def test_a_client_that_never_reads_cannot_keep_a_server_that_is_told_to_end(tiny_folder: Path, folder: Path) -> None:
    options = [str(tiny_folder), "--directions", str(folder), "--drain", "1"]
    with Server(*options, directions=folder) as server:
        body = {"model": server.model_name, "prompt": "hello", "steer": "refusal", "n": 16, "logprobs": 5, **LONG}
        with closing(small_socket(server.port)) as reader:
            reader.sendall(posted(json.dumps(body).encode()))
            eventually(lambda: "steer_steered_running 1.0" in server.client.get("/metrics").text)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(timeout=120) == 0


def test_a_connection_outlives_the_patience_of_clients(lasting: Server) -> None:
    """Were the server's time that of clients, a request could be sent into a connection that is just being closed."""
    assert outlives_clients(lasting)


def posted(body: bytes) -> bytes:
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def small_socket(port: int) -> socket.socket:
    opened = socket.socket()
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # before connecting: it sets the window
    opened.settimeout(60)
    opened.connect(("127.0.0.1", port))
    return opened
