"""The bundle an auditor gets: it stands by itself, and whatever is done to it is found."""

import hashlib
import io
import json
import shutil
import zipfile

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from trace_ray.cli import app
from trace_ray.config import GateSection
from trace_ray.core.policy import parse_policy
from trace_ray.errors import AuditError
from trace_ray.rollout.audit_export import export, verify_bundle
from trace_ray.rollout.gate import gate_row
from trace_ray.runtime.audit_log import AuditLog
from trace_ray.runtime.bundle import MANIFEST
from trace_ray.runtime.store import write_json, write_rows
from trace_ray.types import Category, EvalPrompt, Message

CLAUSE = {"id": "thanks", "text": "Thank.", "checks": {"must_include": {"any": ["thanks"]}}}
LIVE = {
    "what": "withdraw",
    "wave": 1,
    "test": {"alpha": 0.05, "margin": 0.05},
    "tests": {
        "success": {
            **{"blocks": 50, "total": 0.0, "variance": 0.3, "decision": "rollback"},
            **{"decided_blocks": 50, "decided_total": 0.0, "decided_variance": 0.3},
        }
    },
}
"""A candidate that failed at every request, and its champion at none."""
POLICY = {"id": "acme", "version": "2", "clauses": [CLAUSE]}


def verify(*words):
    return CliRunner().invoke(app, ["audit", "verify", *map(str, words)])


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """A run's records as a run writes them: report, answers, outcomes, verdicts, chain."""
    at = tmp_path_factory.mktemp("fleet")
    (at / "policy.yaml").write_text(yaml.safe_dump(POLICY))
    (at / "pairs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    config = {
        "policy": "policy.yaml",
        "data": {"source": "pairs.jsonl"},
        "judge": {"kind": "rules"},
        "models": [{"name": "one", "base": "demo:smollm2"}],
        "storage": str(at / "storage"),
    }
    (at / "fleet.yaml").write_text(yaml.safe_dump(config))
    run = at / "storage" / "runs" / "acme-2-12345678"
    run.mkdir(parents=True)
    item = EvalPrompt((Message("user", "hello"),), Category.INVERT)
    answers = [
        item.to_row() | {"before": a, "after": "thanks", "before_agrees": ok, "after_agrees": True}
        for a, ok in [("no", False)] * 30 + [("thanks", True)] * 40
    ]
    write_rows(at / "answers.parquet", answers)
    write_json(at / "outcomes.json", {"drift": [0.1, 0.2], "capability": None})
    policy = parse_policy(POLICY, "policy.yaml")
    model = {
        "name": "one",
        "adapter_id": "one@2-aaaaaaaa",
        "registered_as": "trace-one/2",
        "answers_path": str(at / "answers.parquet"),
        "gate": gate_row(policy, str(at / "answers.parquet"), GateSection()),
    }
    assert model["gate"]["verdict"] == "promote"
    about = {"id": "acme", "version": "2", "digest": policy.digest}
    report = {"run_id": run.name, "policy": about, "models": [model]}
    write_json(run / "report.json", report)
    (run / "report.html").write_text("<!doctype html>")
    write_rows(run / "verdicts.parquet", [{"pair_id": f"p{i}", "label": "x"} for i in range(300)])
    (at / "storage" / "latest").symlink_to(run)
    log = AuditLog(at / "storage" / "audit", key=b"the operators' own")
    for number in range(2):
        log.append("note", {}, {"n": number}, "ana")
    made = {"models": [model], "gate_config": GateSection().model_dump(mode="json")}
    log.append("realign", {"policy": policy.digest}, {"run_id": run.name} | made, "ana")
    log.append("promote", {}, {"id": "1", "live": LIVE}, "ana")
    return at


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    at = tmp_path_factory.mktemp("keys")
    for name in ("mine", "other"):
        key = Ed25519PrivateKey.generate()
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        (at / f"{name}.pem").write_bytes(private)
        (at / f"{name}.pub").write_bytes(public)
    return at


@pytest.fixture(scope="module")
def bundle(fleet, keys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACE_RAY_AUDIT_SIGNING_KEY", str(keys / "mine.pem"))
        assert export(str(fleet / "fleet.yaml"), fleet / "out.zip") == "ed25519"
    return fleet / "out.zip"


def test_another_fleet_s_newer_run_in_the_same_storage_is_not_exported(fleet, tmp_path):
    storage = tmp_path / "storage"
    shutil.copytree(fleet / "storage", storage, symlinks=True)
    newer = storage / "runs" / "acme-2-newer"
    shutil.copytree(storage / "runs" / "acme-2-12345678", newer)
    report = json.loads((newer / "report.json").read_text())
    write_json(newer / "report.json", report | {"run_id": newer.name, "fleet": "theirs"})
    (storage / "latest").unlink()
    (storage / "latest").symlink_to("runs/acme-2-newer")
    config = yaml.safe_load((fleet / "fleet.yaml").read_text()) | {"storage": str(storage)}
    for prefix, wanted in (("trace", "acme-2-12345678"), ("theirs", newer.name)):
        path = fleet / f"{prefix}.yaml"
        path.write_text(yaml.safe_dump(config | {"tracking": {"registry_prefix": prefix}}))
        export(str(path), tmp_path / "out.zip")
        with zipfile.ZipFile(tmp_path / "out.zip") as archive:
            assert json.loads(archive.read("report.json"))["run_id"] == wanted


def test_a_third_party_verifies_with_the_public_key_alone(fleet, bundle, keys, tmp_path):
    alone = tmp_path / "from-the-operators"
    alone.write_bytes(bundle.read_bytes())
    done = verify(alone, "--public-key", keys / "mine.pub")
    assert done.exit_code == 0, done.output
    assert "4 records, unbroken; 1 gate decisions and 1 of live traffic made again" in done.output
    assert "the given one" in done.output
    assert "give --public-key" in verify(alone).output
    wrong = verify(alone, "--public-key", keys / "other.pub")
    assert wrong.exit_code == 2
    assert "was signed with another key" in wrong.output
    with zipfile.ZipFile(bundle) as archive:
        assert len(archive.read("verdicts.jsonl").splitlines()) == 200
        assert archive.read("report.html") == b"<!doctype html>"


def test_hmac_and_unsigned(fleet, monkeypatch, tmp_path):
    out = tmp_path / "b.zip"
    words = ["audit", "export", str(fleet / "fleet.yaml"), str(out)]
    assert "signature: none" in CliRunner().invoke(app, words).output
    assert "not signed" in verify(out).output
    monkeypatch.setenv("TRACE_RAY_AUDIT_KEY", "the operators' own")
    done = CliRunner().invoke(app, words)
    assert "signature: hmac-sha256" in done.output, done.output
    assert "HMAC checked" in verify(out).output
    monkeypatch.setenv("TRACE_RAY_AUDIT_KEY", "guess")
    assert verify(out).exit_code == 2
    monkeypatch.delenv("TRACE_RAY_AUDIT_KEY")
    assert "HMAC not checked: set TRACE_RAY_AUDIT_KEY" in verify(out).output


def test_what_can_not_be_exported(fleet, tmp_path):
    words = ["audit", "export", str(fleet / "fleet.yaml"), str(tmp_path / "b.zip")]
    done = CliRunner().invoke(app, [*words, "--run", "nowhere"])
    assert (done.exit_code, "holds no report.json" in done.output) == (2, True)
    (tmp_path / "x.zip").write_text("no zip")
    assert "is not a whole zip" in verify(tmp_path / "x.zip").output


def forged(bundle, out, **changed):
    """Write a bundle with other files in it, its manifest's digests made to fit."""
    with zipfile.ZipFile(bundle) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    files |= {name.replace("__", "/"): data for name, data in changed.items()}
    manifest = json.loads(files[MANIFEST])
    manifest["files"] = {
        name: hashlib.sha256(data).hexdigest()
        for name, data in files.items()
        if name in manifest["files"]
    }
    files[MANIFEST] = json.dumps(manifest).encode()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


@pytest.fixture(scope="module")
def unsigned(fleet):
    export(str(fleet / "fleet.yaml"), fleet / "unsigned.zip")
    return fleet / "unsigned.zip"


def test_a_decision_that_its_live_evidence_does_not_lead_to_is_found(fleet, tmp_path):
    storage = shutil.copytree(fleet / "storage", tmp_path / "storage", symlinks=True)
    config = yaml.safe_load((fleet / "fleet.yaml").read_text()) | {"storage": str(storage)}
    (fleet / "copy.yaml").write_text(yaml.safe_dump(config))
    log = AuditLog(storage / "audit", key=b"the operators' own")
    log.append("promote", {}, {"id": "2", "live": LIVE | {"what": "promote"}}, "eve")
    export(str(fleet / "copy.yaml"), tmp_path / "out.zip")
    done = verify(tmp_path / "out.zip")
    assert done.exit_code == 2
    assert "record 4 (promote): its tests don't let the candidate through" in done.output


def test_a_part_that_claims_to_be_encrypted_is_refused(bundle, tmp_path):
    raw = bytearray(bundle.read_bytes())
    with zipfile.ZipFile(bundle) as archive:
        raw[archive.start_dir + 8] |= 1  # a flag of the first entry in the central directory
    (tmp_path / "damaged.zip").write_bytes(raw)
    with pytest.raises(AuditError, match=r"is not a whole zip file: .*encrypted"):
        verify_bundle(tmp_path / "damaged.zip")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_edited_dropped_or_reordered_record_is_found(unsigned, data):
    """Even without a signature, and with a manifest made to fit."""
    with zipfile.ZipFile(unsigned) as archive:
        lines = archive.read("chain.jsonl").splitlines(keepends=True)
    kind = data.draw(st.sampled_from(["edit", "drop", "swap", "repeat", "cut"]))
    place = data.draw(st.integers(0, len(lines) - 1))
    broken = list(lines)
    if kind == "edit":
        row = json.loads(lines[place])
        name = data.draw(st.sampled_from(["who", "what", "at", "previous", "digest"]))
        row[name] += data.draw(st.text(min_size=1, max_size=3))
        broken[place] = (json.dumps(row) + "\n").encode()
    elif kind == "drop":
        del broken[place]
    elif kind == "swap":
        other = (place + data.draw(st.integers(1, len(lines) - 1))) % len(lines)
        broken[place], broken[other] = broken[other], broken[place]
    elif kind == "repeat":
        broken.insert(place, lines[place])
    else:
        broken = broken[:place]
    out = unsigned.with_name("forged.zip")
    forged(unsigned, out, **{"chain.jsonl": b"".join(broken)})
    with pytest.raises(AuditError, match=r"chain\.jsonl|head\.json"):
        verify_bundle(out)


def test_a_signed_bundle_can_not_be_made_to_fit(bundle, tmp_path):
    out = tmp_path / "forged.zip"
    forged(bundle, out, **{"verdicts.jsonl": b"{}\n"})
    with pytest.raises(AuditError, match="its signature was made with another key"):
        verify_bundle(out)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damaged_byte_is_found_or_changes_nothing(bundle, data):
    raw = bytearray(bundle.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    out = bundle.with_name("damaged.zip")
    out.write_bytes(raw)
    try:
        verify_bundle(out)
    except AuditError:
        return
    with zipfile.ZipFile(bundle) as whole, zipfile.ZipFile(io.BytesIO(bytes(raw))) as other:
        for name in whole.namelist():
            assert whole.read(name) == other.read(name)


@pytest.mark.parametrize(
    ("name", "edit", "told"),
    [
        (
            "policy.yaml",
            lambda d: d.replace(b"Thank.", b"Curse."),
            "policy.yaml: is not the policy",
        ),
        ("report.json", lambda d: d.replace(b'"promote"', b'"reject"'), "differs from the chain"),
        ("report.json", lambda d: d.replace(b"trace-one/2", b"trace-one/3"), "has no record of"),
        ("report.json", lambda d: b"[]", "is no whole export"),
        (
            "gate/one/answers.jsonl",
            lambda d: d.replace(b'"before_agrees": false', b'"before_agrees": true'),
            "does not lead to the gate's decision",
        ),
        ("gate/config.json", lambda d: d.replace(b"0.05", b"0.04"), "not what the chain says"),
    ],
)
def test_parts_of_another_run_are_found_though_unsigned(unsigned, tmp_path, name, edit, told):
    with zipfile.ZipFile(unsigned) as archive:
        data = edit(archive.read(name))
    forged(unsigned, tmp_path / "f.zip", **{name: data})
    with pytest.raises(AuditError, match=told):
        verify_bundle(tmp_path / "f.zip")
