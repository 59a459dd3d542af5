"""The parts of the endpoint that need no engine: acts, windows, limits, keys, records, harvest."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from typer.testing import CliRunner

from trace_ray.cli import app
from trace_ray.config.serve import ComplianceSettings, Limits, Records
from trace_ray.core.policy import Policy
from trace_ray.data.sources import read_prompts
from trace_ray.errors import ConfigError, DataError
from trace_ray.serve import turn as turn_module
from trace_ray.serve.admission import Admission
from trace_ray.serve.answers import (
    event_text,
    read_event,
    replaced_event,
    reply_text,
    retry_body,
)
from trace_ray.serve.app import build_app
from trace_ray.serve.calls import timed
from trace_ray.serve.config import (
    ComplianceTable,
    ServeConfig,
    ServedModel,
    compliance_table,
)
from trace_ray.serve.harvest import harvest
from trace_ray.serve.keys import Keys, Role, add_key, read_keys, revoke_key
from trace_ray.serve.limiter import Limiter
from trace_ray.serve.metrics import Metrics
from trace_ray.serve.modes import MODES, Act, act_on, effective_mode, sampled, withheld
from trace_ray.serve.police import Judged, Police
from trace_ray.serve.records import RecordWriter, Redactor, read_records
from trace_ray.serve.requests import RequestError, limited, read_json
from trace_ray.serve.turn import Turn
from trace_ray.serve.windows import Window, beginning_policy
from trace_ray.testing import tiny_model
from trace_ray.types import Label, Message, Verdict

MODE = st.sampled_from(MODES)


def _tried(work):
    """Return (result, None), or (None, the error of a request that is refused)."""
    try:
        return work(), None
    except RequestError as error:
        return None, error


@given(MODE, st.none() | MODE)
def test_only_an_admin_goes_below_the_floor(floor, asked):
    mode = effective_mode(floor, asked, admin=False)
    assert MODES.index(mode) >= MODES.index(floor)
    assert mode in (floor, asked)
    assert effective_mode(floor, asked, admin=True) == (asked or floor)


@given(MODE, st.sampled_from(list(Label)), st.sampled_from(["open", "closed"]))
def test_block_alone_withholds(mode, label, fail):
    act = act_on(ComplianceSettings(mode=mode, fail=fail), mode, label)
    bad = label is Label.VIOLATES or (label is Label.UNJUDGED and fail == "closed")
    assert withheld(act) == (mode == "block" and bad)
    if mode == "block" and label is Label.UNJUDGED:
        assert act is (Act.FAILED_OPEN if fail == "open" else Act.FAILED_CLOSED)


def test_the_sample_has_its_share():
    share = sum(sampled(str(i), 0.25) for i in range(4000)) / 4000
    assert share == pytest.approx(0.25, abs=0.03)
    assert all(sampled(str(i), 1) for i in range(100))
    assert not any(sampled(str(i), 0) for i in range(100))


@given(
    st.lists(st.text(max_size=9), max_size=30),
    st.integers(1, 20),
    st.none() | st.integers(0, 30),
)
def test_no_text_goes_out_unchecked_and_none_is_lost(parts, size, hold_back):
    window, out = Window(size, hold_back), []
    for part in parts:
        window.add(part, part)
        if window.due:
            out += window.passed(len(window.text))
        sent = len("".join(out))
        assert sent <= max(0, window.checked - (hold_back or 0))
        assert hold_back is not None or not sent
        assert window.started == bool(out)
        if hold_back is not None:
            assert len(window.text) - window.checked < size
    assert out + window.finished() == parts


def test_what_can_still_heal_is_not_held_against_a_beginning():
    clauses = [
        {"id": "thanks", "text": "t", "checks": {"must_include": {"any": ["thanks"]}}},
        {
            "id": "both",
            "text": "t",
            "checks": {"must_match": "ok", "must_not_include": {"any": ["bad"]}},
        },
        {
            "id": "unless",
            "text": "t",
            "checks": {"must_not_match": "price"},
            "exceptions": ["quoted"],
        },
        {"id": "fiction", "text": "t", "checks": {"max_words": 3}, "exceptions": ["asked"]},
    ]
    contexts = {"quoted": {"regex": "quote"}, "asked": {"prompt_regex": "story"}}
    row = {"id": "p", "version": "1", "clauses": clauses, "contexts": contexts}
    policy = Policy.model_validate(row)
    rules = beginning_policy(policy).rules
    assert [clause.id for clause in rules.checked] == ["both", "fiction"]
    prompt = (Message("user", "hello"),)
    assert rules.verdict(prompt, "some price").label is Label.COMPLIES
    assert rules.verdict(prompt, "so bad").clause == "both"
    assert rules.verdict(prompt, "one two three four").clause == "fiction"
    assert rules.verdict((Message("user", "a story"),), "a b c d").label is Label.COMPLIES


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=300)
@given(
    st.binary(max_size=200)
    | st.dictionaries(st.text(), _JSON).map(lambda v: json.dumps(v).encode())
)
def test_a_body_is_read_or_refused_with_400(raw):
    body, error = _tried(lambda: read_json(raw))
    if error is None:
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    else:
        assert error.status == 400


_COUNTED = ["n", "best_of", "max_tokens", "max_completion_tokens", "prompt"]


@given(st.sampled_from(["chat", "completion"]), st.dictionaries(st.sampled_from(_COUNTED), _JSON))
def test_limits_hold_or_refuse(kind, body):
    found, error = _tried(lambda: limited(kind, body, Limits(max_n=4, max_tokens=10), 100))
    if error is None:
        taken = found.get("max_completion_tokens") if kind == "chat" else None
        taken = found.get("max_tokens") if taken is None else taken
        assert 1 <= taken <= 10
        assert (found.get("n") or 1) <= 4
    else:
        assert error.status == 400


def test_a_completion_that_names_no_limit_keeps_its_default():
    assert limited("completion", {}, Limits(max_tokens=50), 100)["max_tokens"] == 16
    assert limited("chat", {}, Limits(), 100) == {}


@settings(max_examples=60)
@given(st.lists(st.floats(0, 5), min_size=1, max_size=60), st.integers(1, 5))
def test_a_key_never_sends_faster_than_its_rate(waits, burst):
    limiter = Limiter(Limits(requests_per_minute=60, burst=burst))
    now, times = 0.0, []
    for wait in waits:
        now += wait
        held = limiter.admitted("a", now)
        _, error = _tried(held.__enter__)
        if error is None:
            held.__exit__(None, None, None)
            times.append(now)
        else:
            assert error.status == 429
            assert 1 <= int(error.headers["retry-after"]) <= 2
        assert limiter.in_flight == 0
    assert len(times) <= burst + now + 1e-6
    with limiter.admitted("another key", now):
        assert limiter.in_flight == 1


def test_more_in_flight_than_there_is_room_for_are_refused():
    limiter = Limiter(Limits(max_in_flight=1))
    with limiter.admitted("", 0):
        with pytest.raises(RequestError) as found, limiter.admitted("", 0):
            raise AssertionError
        assert (found.value.status, found.value.headers) == (429, {"retry-after": "1"})
    with limiter.admitted("", 0):
        assert limiter.in_flight == 1


def test_keys_are_kept_as_digests_and_revoked_at_once(tmp_path):
    file = tmp_path / "keys.jsonl"
    made = CliRunner().invoke(app, ["keys", "create", str(file), "--name", "ci", "--role", "admin"])
    key = made.stdout.strip().splitlines()[-1]
    assert made.exit_code == 0
    assert key.rsplit("-", 1)[-1] not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    keys = Keys(str(file))
    found = keys.find(f"Bearer {key}")
    assert found is not None
    assert (found.name, found.role, keys.required) == ("ci", "admin", True)
    for wrong in (
        None,
        "",
        key,
        f"Basic {key}",
        f"Bearer {key[:-1]}x",
        f"Bearer {key}\n\n",
        "Bearer",
    ):
        assert keys.find(wrong) is None or wrong == f"Bearer {key}\n\n"
    add_key(file, "another", Role.USE)
    listed = CliRunner().invoke(app, ["keys", "list", str(file)]).stdout
    assert "ci" in listed
    assert "another" in listed
    revoke_key(file, found.id)
    assert keys.find(f"Bearer {key}") is None
    with pytest.raises(ConfigError, match="no key"):
        revoke_key(file, "nobody")
    with pytest.raises(ConfigError, match="no such file"):
        revoke_key(tmp_path / "elsewhere" / "keys.jsonl", "nobody")
    file.write_text('{"id": 1}\n')
    with pytest.raises(ConfigError, match=r"keys\.jsonl:1"):
        Keys(str(file))
    assert not Keys(None).required


def test_keys_made_at_once_are_all_kept(tmp_path):
    file = tmp_path / "keys.jsonl"
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda name: add_key(file, str(name), Role.USE)[1], range(40)))
    assert read_keys(file) == {record.id: record for record in made}


@pytest.mark.parametrize("command", [["list"], ["create", "--name", "a"], ["revoke", "a"]])
def test_a_damaged_file_of_keys_is_named_in_a_line(tmp_path, command):
    file = tmp_path / "keys.jsonl"
    row = {"id": ["a"], "name": "n", "role": "use", "sha256": "0" * 64, "created": "now"}
    for damage in (b"\xff\n", json.dumps(row).encode()):
        file.write_bytes(damage)
        found = CliRunner().invoke(app, ["keys", command[0], str(file), *command[1:]])
        assert (found.exit_code, found.output.count("\n")) == (2, 1)
        assert file.read_bytes() == damage


def test_keys_whose_file_is_lost_stay_as_last_read(tmp_path):
    file = tmp_path / "keys.jsonl"
    key, _ = add_key(file, "web", Role.USE)
    keys, text = Keys(str(file)), file.read_text()
    for damage in (file.unlink, lambda: file.write_bytes(b"\xff"), lambda: file.write_text("{}\n")):
        damage()
        assert keys.find(f"Bearer {key}") is not None
        assert keys.find(f"Bearer {key[:-1]}_") is None
        with pytest.raises(ConfigError, match=r"keys\.jsonl"):  # never read: it doesn't start
            Keys(str(file))
    file.write_text(text)
    revoke_key(file, key.split("-")[1])
    assert keys.find(f"Bearer {key}") is None


def test_keys_of_the_environment_guard_the_door(monkeypatch, tmp_path):
    key, _ = add_key(tmp_path / "keys.jsonl", "web", Role.USE)
    monkeypatch.setenv("TRACE_RAY_KEYS", (tmp_path / "keys.jsonl").read_text())
    door = Admission(Limits(), None)

    def asking(text):
        header = (b"authorization", text.encode())
        return Request({"type": "http", "method": "POST", "path": "/", "headers": [header]})

    found = door.key(asking(f"Bearer {key}"))
    assert found is not None
    assert found.name == "web"
    for wrong in ("", f"Bearer {key[:-1]}_"):
        with pytest.raises(RequestError) as refused:
            door.key(asking(wrong))
        assert refused.value.status == 401
    monkeypatch.setenv("TRACE_RAY_KEYS", "{")
    with pytest.raises(ConfigError, match="TRACE_RAY_KEYS:1"):
        Admission(Limits(), None)


def test_a_door_with_other_settings_remembers_who_sent_how_much():
    limits = Limits(requests_per_minute=1, burst=1, max_in_flight=1)
    door = Admission(limits, None)
    with door.place(None):
        after = Admission(limits.model_copy(update={"max_tokens": 7}), None, door)
        assert after.full  # of a request that came in before
    assert (after.in_flight, after.limits.max_tokens) == (0, 7)
    with pytest.raises(RequestError, match="requests per minute"), after.place(None):
        raise AssertionError
    more = Admission(limits.model_copy(update={"requests_per_minute": 2}), None, after)
    with more.place(None):
        assert more.in_flight == 1


def test_records_are_whole_files_without_texts_unless_allowed(tmp_path):
    writer = RecordWriter(str(tmp_path), Records(rows=2))
    writer.write({"n": 1}, {"response": "secret"})
    assert not list(read_records(tmp_path))
    writer.write({"n": 2})
    writer.write({"n": 3})
    assert list(read_records(tmp_path)) == [{"n": 1}, {"n": 2}]
    writer.rotate(close=True)
    assert [row["n"] for row in read_records(tmp_path)] == [1, 2, 3]
    dead = tmp_path / next(tmp_path.glob("decisions-*")).name.replace("decisions-", ".decisions-")
    host, _, tag = dead.name.rsplit("-", 2)
    dead = dead.with_name(f"{host}-99999999-{tag}")
    dead.write_text('{"n": 4}\n{"n": 5')
    RecordWriter(str(tmp_path), Records())
    assert {row["n"] for row in read_records(tmp_path)} == {1, 2, 3, 4}


def test_a_full_disk_leaves_whole_rows_alone(tmp_path):
    lost = []
    writer = RecordWriter(str(tmp_path), Records(), lambda: lost.append(1))
    assert writer.keep({"n": 1})
    (draft,) = tmp_path.iterdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (draft.stat().st_size + 20, before[1]))
    try:
        assert [writer.keep({"n": 2, "text": "x" * 40}) for _ in range(2)] == [False, False]
        assert (len(lost), writer.problem) == (
            2,
            "records can't be written: No space left on device",
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert writer.keep({"n": 3})
    assert writer.problem == ""
    writer.rotate(close=True)
    assert list(read_records(tmp_path)) == [{"n": 1}, {"n": 3}]


@given(st.text(), st.text())
def test_redaction_leaves_no_address(before, after):
    redact = Redactor(Records().redact)
    assert "me@example.org" not in redact(f"{before} me@example.org {after}")
    assert redact("card 4111 1111 1111 1111.") == "card [card]."
    assert redact("call +49 30 1234567 now") == "call [phone] now"
    assert redact("in 2026 and 12 more") == "in 2026 and 12 more"


def test_a_pattern_that_matches_nothing_at_all_is_refused():
    with pytest.raises(ValueError, match="matches the empty text"):
        Records(redact={"x": "a*"})
    with pytest.raises(ValueError, match="not a regular expression"):
        Records(redact={"x": "("})


def test_answers_of_all_forms():
    call = {"function": {"name": "f", "arguments": "{}"}}
    message = {"content": "b", "reasoning_content": "a", "tool_calls": [call]}
    assert reply_text("chat", {"message": message}) == "a\nb\nf{}"
    assert reply_text("chat", {"delta": {"content": None}}) == ""
    assert reply_text("completion", {"text": "ab"}) == "ab"
    event = read_event(replaced_event("chat", 1, "no", {"id": "x"}, first=True))
    assert event == {
        "id": "x",
        "choices": [
            {
                "index": 1,
                "delta": {"role": "assistant", "content": "no"},
                "logprobs": None,
                "finish_reason": "content_filter",
            }
        ],
    }
    policy = Policy.model_validate(
        {"id": "p", "version": "1", "clauses": [{"id": "c", "text": "Be kind."}]}
    )
    body = {"messages": [{"role": "user", "content": "hi"}], "n": 3}
    again = retry_body(body, ComplianceSettings(retry_instruction="Again:"), policy, "c")
    assert again == {"messages": [{"role": "user", "content": "hi\n\nAgain: Be kind."}], "n": 1}


def _decision(request_id: str, label: str = "violates", **more: object) -> dict[str, object]:
    row = {"type": "decision", "request_id": request_id, "index": 0, "model": "m", "label": label}
    return row | {"prompt": [{"role": "user", "content": request_id}], "response": "bad"} | more


def test_harvest_makes_pairs_of_what_was_corrected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no records"):
        harvest(tmp_path, tmp_path / "pairs.jsonl")
    writer = RecordWriter(str(tmp_path), Records(texts=True))
    without = _decision("d")
    del without["prompt"], without["response"]
    for row in (
        _decision("a", retried="good"),
        _decision("b"),
        _decision("c", label="complies"),
        _decision("fine", label="complies"),
        {"type": "request", "request_id": "failed", "model": "m", "failed": True},
        without,
        {"type": "check", "request_id": "given", "model": "m", "label": "violates"},
        {"type": "edit", "request_id": "c", "index": 0, "response": "better"},
        {"type": "edit", "request_id": "nobody", "index": 0, "response": "x"},
    ):
        writer.write(row)
    writer.rotate(close=True)
    out = tmp_path / "pairs.jsonl"
    counts = harvest(tmp_path, out)
    assert counts == {
        "unknown_request": 1,
        "retried": 1,
        "uncorrected": 1,
        "edited": 1,
        "without_texts": 1,
    }
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["chosen"], row["rejected"]) for row in rows] == [
        ("bad", "good"),
        ("bad", "better"),
    ]
    assert [prompt[0].content for prompt in read_prompts(out)] == ["a", "c"]


def _answer(text: str) -> str:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    return json.dumps({"choices": [choice], "usage": {"completion_tokens": 3}})


def _counts(monkeypatch, metrics, name):
    """Return where the labels of each count of a metric go."""
    found = []
    monkeypatch.setattr(
        getattr(metrics, name), "inc", lambda value=1, tags=None: found.append(tags)
    )
    return found


def test_a_second_answer_that_complies_goes_out(tmp_path, monkeypatch):
    metrics = Metrics()
    counted = _counts(monkeypatch, metrics, "_verdicts")
    policy = {
        "id": "p",
        "version": "1",
        "clauses": [{"id": "c", "text": "Be kind.", "checks": {"must_not_match": "rude"}}],
    }
    settings = ComplianceSettings(mode="block", on_block="retry")
    writer = RecordWriter(str(tmp_path), Records(texts=True, rows=1))
    body = {"messages": [{"role": "user", "content": "hi"}]}
    turn = Turn(
        kind="chat",
        body=body,
        model="m",
        adapter="base",
        mode="block",
        request_id="r",
        police=Police(ComplianceTable(settings=settings, policy=policy), _no_judge),
        prompts=[(Message("user", "hi"),)],
        metrics=metrics,
        records=writer,
    )
    sent = []

    async def complete(body):
        sent.append(body["messages"][0]["content"])
        return 200, _answer("gladly")

    answer = json.loads(asyncio.run(turn.whole(_answer("rude"), complete)))
    assert answer["choices"][0]["message"]["content"] == "gladly"
    assert answer["compliance"]["verdicts"][0]["acted"] == "retried"
    assert answer["usage"]["completion_tokens"] == 6
    assert sent == [f"hi\n\n{settings.retry_instruction} Be kind."]
    row = next(read_records(tmp_path))
    assert (row["label"], row["response"], row["retried"]) == ("violates", "rude", "gladly")
    assert (row["retry"]["label"], row["retry"]["clause"]) == ("complies", None)
    assert [tags["role"] for tags in counted] == ["retry", "enforced"]


def test_a_verdict_that_was_not_had_agrees_with_nothing(monkeypatch):
    metrics = Metrics()
    agreed, counted = (_counts(monkeypatch, metrics, n) for n in ("_agreement", "_verdicts"))
    none, bad = (
        Judged(Verdict(label, None, "j"), 0.1) for label in (Label.UNJUDGED, Label.VIOLATES)
    )
    for pair in ((none, none), (none, bad), (bad, none), (bad, bad)):
        metrics.shadow("m", "p 2", *pair)
    assert agreed == [{"model": "m", "agree": "true", "would_block": "true"}]
    assert len(counted) == 4


def _shadow_turn(metrics):
    policy = {
        "id": "p",
        "version": "1",
        "clauses": [{"id": "c", "text": "Be kind.", "checks": {"must_not_match": "rude"}}],
    }
    settings = ComplianceSettings(mode="shadow")
    return Turn(
        kind="chat",
        body={"messages": [{"role": "user", "content": "hi"}]},
        model="m",
        adapter="base",
        mode="shadow",
        request_id="r",
        police=Police(ComplianceTable(settings=settings, policy=policy), _no_judge),
        prompts=[(Message("user", "hi"),)],
        metrics=metrics,
    )


def test_verdicts_beyond_those_that_may_wait_are_counted_not_queued(monkeypatch):
    metrics = Metrics()
    failed, acted = (_counts(monkeypatch, metrics, n) for n in ("_failures", "_acts"))
    monkeypatch.setattr(turn_module, "MAX_LATER", 2)

    async def story():
        for _ in range(5):
            turn = _shadow_turn(metrics)
            await turn.whole(_answer("rude"), _no_judge)
        while turn_module._background:
            await asyncio.sleep(0)

    asyncio.run(story())
    assert failed == [{"model": "m", "reason": "busy"}] * 3
    assert len(acted) == 2


def test_the_first_text_is_timed_as_it_goes_out():
    def event(**delta):
        return event_text({"choices": [{"index": 0, "delta": delta}]})

    sent, seen = [event(role="assistant", content=""), event(content="a"), event(content="b")], []

    async def parts():
        for each in sent:
            yield each

    async def story():
        async for part in timed(parts(), "chat", lambda: seen.append("first")):
            seen.append(part)

    asyncio.run(story())
    assert seen == [sent[0], "first", *sent[1:]]


async def _no_judge(judge, questions):
    raise AssertionError


def test_a_fleet_config_says_how_its_endpoint_polices_itself(tmp_path):
    from trace_ray.config import load_config
    from trace_ray.serve.fleet import _compliance

    (tmp_path / "p.yaml").write_text(
        "{id: p, version: '1', clauses: [{id: c, text: t, checks: {must_not_match: bad}}]}"
    )
    (tmp_path / "pairs.jsonl").touch()
    fleet = tmp_path / "fleet.yaml"
    text = """
policy: p.yaml
data: {source: pairs.jsonl}
judge: {kind: rules}
models: [{name: m, base: demo:smollm2}]
serve:
  compliance: {mode: block, fail: closed}
  shadow_policy: %s
"""
    fleet.write_text(text % "p.yaml")
    found, _ = _compliance(str(fleet), load_config(fleet))
    assert found is not None
    assert (found.mode, found.fail, found.judge) == ("block", "closed", None)
    assert found.policy == found.shadow_policy == str(tmp_path / "p.yaml")
    assert ComplianceTable.model_validate(compliance_table(found).model_dump(mode="json"))
    fleet.write_text(text % "gone.yaml")
    with pytest.raises(ConfigError, match=r"serve\.shadow_policy: no such file"):
        load_config(fleet)


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_engines_are_set_up_for_their_own_devices_not_for_the_deployers(
    tmp_path, monkeypatch, num_gpus
):
    base = str(tiny_model(tmp_path))
    # Of a cluster with a CPU head, or of CPU nodes that a machine with a GPU deploys to.
    monkeypatch.setattr("trace_ray.models.engine.has_gpu", lambda: not num_gpus)
    served = ServeConfig(models=[ServedModel(name="a", base=base)], num_gpus=num_gpus)
    (engines,) = build_app(served)._bound_deployment.init_args
    actor = engines[base]._bound_deployment.ray_actor_options
    names = set(actor["runtime_env"]["env_vars"])
    assert ("VLLM_CPU_KVCACHE_SPACE" in names) == (not num_gpus)
    assert ("VLLM_WORKER_MULTIPROC_METHOD" in names) == bool(num_gpus)
