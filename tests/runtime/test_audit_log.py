"""The audit chain on disk: concurrent writers, torn lines, tampering, the command."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from typer.testing import CliRunner

from trace_ray.cli import app
from trace_ray.errors import AuditError
from trace_ray.runtime.audit_log import CHAIN, HEAD, AuditLog


@pytest.fixture
def log(tmp_path):
    log = AuditLog(tmp_path / "audit")
    for n in range(3):
        log.append("promote", {"policy": f"{n}"}, {"p": 0.01, "n": n}, who="ana")
    return log


def append_some(folder):
    for n in range(5):
        AuditLog(folder).append("promote", {}, {"n": n})


def test_append_and_verify(log):
    assert log.verify().records == 3
    assert [record.evidence["n"] for record in log.records()] == [0, 1, 2]
    done = CliRunner().invoke(app, ["audit", "verify", str(log.files.folder)])
    assert (done.exit_code, "3 records, unbroken" in done.output) == (0, True)


def test_concurrent_writers(tmp_path):
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        list(pool.map(append_some, [tmp_path] * 4))
    assert AuditLog(tmp_path).verify().records == 20


def test_tampering_is_found(log):
    path = log.files.folder / CHAIN
    lines = path.read_text().splitlines(keepends=True)
    edited = lines[1].replace('"ana"', '"bob"')
    for broken in (
        [lines[0], edited, lines[2]],
        lines[:2],
        lines[1:],
        [lines[1], lines[0], lines[2]],
        [],
    ):
        path.write_text("".join(broken))
        with pytest.raises(AuditError, match=CHAIN):
            log.verify()
        done = CliRunner().invoke(app, ["audit", "verify", str(log.files.folder)])
        assert done.exit_code == 2
        with pytest.raises(AuditError):
            log.append("promote", {}, {})
    path.write_text("".join(lines))
    (log.files.folder / HEAD).unlink()
    with pytest.raises(AuditError, match="missing"):
        log.verify()


def test_a_torn_last_line_is_refused_with_advice(log):
    path = log.files.folder / CHAIN
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"number": 3, "prev')
    with pytest.raises(AuditError, match="delete that line"):
        log.append("promote", {}, {})
    path.write_bytes(whole)
    assert log.append("promote", {}, {}).number == 3


def test_a_writer_killed_before_the_head(log):
    head = (log.files.folder / HEAD).read_text()
    log.append("rollback", {}, {})
    (log.files.folder / HEAD).write_text(head)
    assert log.verify().records == 4
    assert log.append("promote", {}, {}).number == 4


def test_a_signed_head(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACE_RAY_AUDIT_KEY", "secret")
    log = AuditLog(tmp_path)
    log.append("promote", {}, {})
    assert log.verify().signed
    monkeypatch.setenv("TRACE_RAY_AUDIT_KEY", "other")
    with pytest.raises(AuditError, match="signature"):
        AuditLog(tmp_path).verify()
    assert json.loads((tmp_path / HEAD).read_text())["signature"]


def test_a_chain_cut_to_its_first_record_or_to_nothing(log):
    path = log.files.folder / CHAIN
    for lines in (path.read_text().splitlines(keepends=True)[:1], []):
        path.write_text("".join(lines))
        with pytest.raises(AuditError, match="3 records were written"):
            log.verify()
