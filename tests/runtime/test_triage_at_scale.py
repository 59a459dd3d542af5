"""Triage on a real Ray cluster with a scripted judge: the store, clauses, abstaining, a killed actor."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from mlflow import MlflowClient

from trace_ray.config import JudgeConfig
from trace_ray.core.checks import evaluate_policy
from trace_ray.core.policy import parse_policy
from trace_ray.core.triage import in_review, triage
from trace_ray.data.sources import pair_schema
from trace_ray.data.synthetic import generate
from trace_ray.errors import JudgeError
from trace_ray.rollout.plan import load_policy
from trace_ray.runtime.judges import JudgeSpec, rule_judge
from trace_ray.runtime.progress import Board, Reporter
from trace_ray.runtime.registry import Registry
from trace_ray.runtime.tally import shown
from trace_ray.runtime.triage import (
    TriageBatch,
    _n_blocks,
    triage_pairs,
)
from trace_ray.runtime.triaged import JudgeCounts, TriagedRows
from trace_ray.runtime.verdict_store import HUMAN, VerdictStore
from trace_ray.types import (
    Category,
    Label,
    Message,
    PreferencePair,
    Verdict,
    content_digest,
    response_id,
)

EXAMPLES = Path(__file__).parents[2] / "examples"
CLAUSES = [
    {"id": "no-foo", "text": "Never say foo.", "checks": {"must_not_match": "foo"}},
    {"id": "no-bar", "text": "Never say bar.", "checks": {"must_not_match": "bar"}},
]
JUDGE = content_digest("script")
SCRIPT = [{"contains": "foo", "p_violate": 0.9}, {"contains": "perhaps", "p_violate": 0.5}]


def policy_of(clauses=CLAUSES, version="2"):
    return parse_policy({"id": "p", "version": version, "clauses": clauses}, "p.yaml")


def scripted(policy, **changes):
    config = JudgeConfig.model_validate({"kind": "scripted", "script": SCRIPT} | changes)
    return JudgeSpec(config, policy, "script", JUDGE, threshold=0.6)


def pairs(n=12, tag=""):
    return [
        PreferencePair(
            (Message("user", f"question {i % 7}{tag}"),),
            f"{'foo' if i % 2 else 'fine'} {i}{tag}",
            f"{'foo too' if i % 4 == 1 else 'good'} {i}{tag}",
        )
        for i in range(n)
    ]


def write(path, rows):
    pq.write_table(pa.Table.from_pylist([r.to_row() for r in rows], schema=pair_schema()), path)
    return path


def judged(rows, spec, store):
    """Triage without Ray: the actor's own function."""
    batch = pa.Table.from_pylist([row.to_row() for row in rows], schema=pair_schema())
    out = TriageBatch(spec, store)(batch)
    calls, hits = (sum(out.column(name).to_pylist()) for name in ("judge_calls", "cache_hits"))
    return out.to_pylist(), calls, hits


def read(folder):
    rows = TriagedRows(folder)
    return list(rows), rows.judged()


@pytest.fixture
def store(tmp_path):
    return VerdictStore(str(tmp_path / "verdicts"))


def test_a_second_run_asks_nothing_and_new_rows_only_themselves(store):
    spec = scripted(policy_of())
    first, calls, hits = judged(pairs(), spec, store)
    assert (calls, hits) == (18, 0)  # 12 chosen, and rejected where chosen violates
    again, calls, hits = judged(pairs(), spec, store)
    assert (calls, hits) == (0, 18)
    assert [row["category"] for row in again] == [row["category"] for row in first]
    _, calls, hits = judged(pairs(13), spec, store)
    assert (calls, hits) == (1, 18)


def test_a_threshold_or_band_set_later_asks_nothing(store):
    rows = [PreferencePair((Message("user", "q"),), "perhaps", "good")]
    spec = scripted(policy_of())
    found, calls, _ = judged(rows, spec, store)
    assert (found[0]["category"], calls) == ("retain", 1)
    strict = JudgeSpec(spec.config, spec.policy, "script", spec.digest, threshold=0.4)
    found, calls, hits = judged(rows, strict, store)
    assert (found[0]["category"], calls, hits) == ("invert", 1, 1)  # 'rejected' is new
    careful = scripted(policy_of(), abstain={"p_low": 0.3, "p_high": 0.7})
    found, calls, _ = judged(rows, careful, store)
    assert (found[0]["category"], calls) == ("unjudged", 0)
    assert found[0]["verdict_chosen"]["reason"].startswith("abstains")
    assert found[0]["verdict_chosen"]["p_violate"] == 0.5


def test_by_clause_only_the_changed_clause_is_asked_again(store):
    script = [{"contains": "foo", "p_violate": 0.9, "clause": "no-foo"}]
    by_clause = {"granularity": "clause", "script": script}
    _, calls, _ = judged(pairs(), scripted(policy_of(), **by_clause), store)
    assert calls == 36  # two clauses a reply
    changed = [CLAUSES[0], CLAUSES[1] | {"text": "Never ever say bar."}]
    found, calls, hits = judged(pairs(), scripted(policy_of(changed, "3"), **by_clause), store)
    assert (calls, hits) == (18, 18)
    assert Counter(row["category"] for row in found) == {"retain": 6, "invert": 3, "punish": 3}
    assert found[1]["verdict_chosen"]["clause"] == "no-foo"


def test_by_clause_a_tier_may_be_recorded_only(store):
    clauses = [CLAUSES[0] | {"tier": "reduced"}, CLAUSES[1]]
    script = [{"contains": "foo", "p_violate": 0.9, "clause": "no-foo"}]
    spec = scripted(policy_of(clauses), granularity="clause", script=script, tiers={"reduced": 0})
    found, _, _ = judged(pairs(), spec, store)
    assert {row["category"] for row in found} == {"retain"}


def test_people_win_over_every_judge(store):
    spec, (pair,) = scripted(policy_of()), pairs(1)
    said = Verdict(Label.VIOLATES, 1.0, "person:ada", provenance="human")
    key = response_id(pair.prompt, pair.chosen)
    store.append(HUMAN, HUMAN, spec.policy.digest, [(spec.policy.digest, key, said)])
    found, calls, hits = judged([pair], spec, store)
    assert found[0]["category"] == "invert"
    assert found[0]["verdict_chosen"]["provenance"] == "human"
    assert (calls, hits) == (1, 1)


def test_unjudged_is_kept_with_its_reason_and_asked_again(store):
    spec = scripted(policy_of(), script=[{"contains": "", "p_violate": None}])
    for _ in range(2):
        found, calls, _ = judged(pairs(1), spec, store)
        assert (found[0]["category"], calls) == ("unjudged", 1)
        assert found[0]["verdict_chosen"]["reason"] == "the script says nothing"


def test_the_fast_content_id_is_the_content_id():
    from trace_ray.runtime.triage import _PromptKey

    prompt = (Message("system", 'a "b" \u2028'), Message("user", "é\ud800\n"))
    key = _PromptKey([message.to_row() for message in prompt])
    assert key.response_id("réponse\t") == response_id(prompt, "réponse\t")


def test_a_batch_gives_what_judging_row_by_row_gives(store):
    policy = load_policy(str(EXAMPLES / "policy-2026.2.yaml"))
    rows = [gold.pair for gold in generate(seed=3).pairs]
    expected = []
    for pair in rows:
        chosen, rejected = (
            evaluate_policy(policy, pair.prompt, text) for text in (pair.chosen, pair.rejected)
        )
        needed = rejected if chosen.label is Label.VIOLATES else None
        expected.append(triage(pair, chosen, needed).to_row())
    found, _, _ = judged(rows, rule_judge(policy), store)
    assert {row["category"] for row in found} >= {"invert", "punish", "retain"}
    assert [{key: row[key] for key in expected[0]} for row in found] == expected


def test_runs_that_write_at_once_and_gc_lose_nothing(store):
    spec, rows = scripted(policy_of()), pairs(200)
    threads = [
        threading.Thread(target=judged, args=(rows[i * 10 : i * 10 + 10], spec, store))
        for i in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [row.files for row in store.stats()] == [20]
    assert store.gc({spec.digest: {spec.policy.digest}}, 0) == []
    assert [row.files for row in store.stats()] == [1]
    _, calls, hits = judged(rows, spec, store)
    assert (calls, hits) == (0, 300)


def test_gc_removes_what_nobody_names_but_no_persons_word(store):
    spec = scripted(policy_of())
    judged(pairs(), spec, store)
    said = Verdict(Label.VIOLATES, 1.0, "person", provenance="human")
    store.append(HUMAN, HUMAN, "a" * 64, [("a" * 64, "0" * 16, said)])
    assert store.gc({}, older_than_s=3600) == []
    assert [stats.judge for stats in store.gc({}, older_than_s=0)] == [JUDGE[:16]]
    assert [stats.judge for stats in store.stats()] == [HUMAN]
    assert [row["id"] for row in store.rows()] == ["0" * 16]


def test_triage_through_ray_with_rules_over_a_folder_of_shards(cluster, tmp_path):
    (tmp_path / "pairs").mkdir()
    for shard in range(3):
        write(tmp_path / "pairs" / f"{shard}.parquet", pairs(20, f" s{shard}"))
    store, spec = VerdictStore(str(tmp_path / "verdicts")), rule_judge(policy_of())
    board = ray.remote(num_cpus=0)(Board).remote()
    reporter = Reporter(board, "fleet")
    triage_pairs(tmp_path / "pairs", tmp_path / "one", spec, store, reporter)
    line = on_board(board)
    assert (line.stage, line.done, line.total) == ("triage", 60, 60)
    assert "15 invert, 15 punish, 30 retain; " in line.note
    assert "verdicts/s" in line.note
    rows, counts = read(tmp_path / "one")
    assert counts.rows == 60
    assert counts.speed["rows_per_s"] > 0
    expected = {"retain": 30, "invert": 15, "punish": 15}
    assert Counter(str(row.category) for row in rows) == expected
    assert (counts.judge_calls, counts.cache_hits) == (90, 0)
    triage_pairs(tmp_path / "pairs", tmp_path / "two", spec, store)
    again, counts = read(tmp_path / "two")
    assert (counts.judge_calls, counts.cache_hits) == (0, 90)
    assert again == rows
    assert counts.reused() == JudgeCounts(cache_hits=90)
    assert counts.reused().speed == {"rows_per_s": None, "tokens_per_s": None}


def on_board(board):
    """The fleet's line, once the last batch has reported: actors tell of it without waiting."""
    for _ in range(50):
        lines = ray.get(board.get.remote())
        lines = lines if isinstance(lines, dict) else lines[0]
        if lines and lines["fleet"].done == lines["fleet"].total:
            break
        time.sleep(0.1)
    return lines["fleet"]


def test_what_the_view_says_of_a_triage():
    counts = {"rows": 30, "invert": 2, "retain": 28, "judge_calls": 30, "cache_hits": 2}
    note = shown(counts | {"engine_tokens": 40_000}, 100, 20)
    assert note == (
        "2 invert, 28 retain; 1.6 verdicts/s; 2.0k tokens/s; 2 from the store; 0:47 left"
    )
    assert shown({"rows": 100, "retain": 100}, 100, 1) == "100 retain; 0 verdicts/s"


def test_a_triage_is_logged_while_it_goes_on(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("trace_ray.runtime.triage._LOG_EVERY_S", 0.3)
    registry = Registry(f"sqlite:///{tmp_path / 'mlflow.db'}")

    def log(counts, rows):
        registry.log_run("triage r", counts, {"run_id": "r"}, rows, ended=rows == 40)

    source = write(tmp_path / "pairs.parquet", pairs(40))
    spec = scripted(policy_of(), delay_s=0.05, batch_size=8)
    triage_pairs(source, tmp_path / "out", spec, None, log=log)
    client = MlflowClient(registry.uri)
    experiments = [each.experiment_id for each in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    assert (run.info.status, run.data.tags["run_id"]) == ("FINISHED", "r")
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "invert")]
    assert len(set(steps)) > 1
    assert steps == sorted(steps)
    assert (
        run.data.metrics.items() >= {"rows": 40, "invert": 10, "punish": 10, "retain": 20}.items()
    )
    assert run.data.metrics["verdicts_per_s"] > 0


def test_a_judge_actor_that_is_killed_loses_no_row_and_doubles_none(cluster, tmp_path):
    source = write(tmp_path / "pairs.parquet", pairs(160))
    spec = scripted(policy_of(), delay_s=0.02, batch_size=20)
    store = VerdictStore(str(tmp_path / "verdicts"))
    killed = []

    def kill():
        limit = time.monotonic() + 180
        while not killed and time.monotonic() < limit:
            # Only once it has judged something: in mid-run.
            if store.stats():
                for pid in judge_pids():
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            time.sleep(0.05)

    thread = threading.Thread(target=kill)
    thread.start()
    triage_pairs(source, tmp_path / "out", spec, store)
    thread.join()
    assert killed
    rows, counts = read(tmp_path / "out")
    assert Counter(row.pair_id for row in rows) == {row.pair_id: 1 for row in pairs(160)}
    assert Counter(str(row.category) for row in rows) == {"retain": 80, "invert": 40, "punish": 40}
    assert counts.judge_calls + counts.cache_hits == 240


def judge_pids():
    """Processes of this test's cluster that run the map_batches actor."""
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            name = (proc / "cmdline").read_bytes().decode(errors="replace")
            parent = int((proc / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError):
            continue
        if "MapWorker" in name and is_ours(parent):
            found.append(int(proc.name))
    return found


def is_ours(pid):
    while pid > 1:
        if pid == os.getpid():
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            return False
    return False


def grow(folder):
    """Triage on a cluster with cores to spare; write the numbers of actors, rows and files."""
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    source = write(folder / "pairs.parquet", pairs(64))
    config = {"actors": {"min": 1, "max": 2}, "batch_size": 8, "delay_s": 0.2}
    counts, over = set(), threading.Event()

    def count():
        while not over.wait(0.1):
            counts.add(len(judge_pids()))

    thread = threading.Thread(target=count)
    thread.start()
    try:
        triage_pairs(source, folder / "out", scripted(policy_of(), **config), None)
    finally:
        over.set()
        thread.join()
    files = len(list((folder / "out").glob("*.parquet")))
    seen = [sorted(counts), len(read(folder / "out")[0]), files]
    (folder / "seen.json").write_text(json.dumps(seen))


def test_a_pool_grows_and_every_actor_gets_rows_of_a_small_file(tmp_path):
    code = "import sys, pathlib, test_triage_at_scale as t; t.grow(pathlib.Path(sys.argv[1]))"
    here = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": here},
        capture_output=True,
        text=True,
        timeout=720,
    )
    assert done.returncode == 0, done.stderr
    counts, rows, files = json.loads((tmp_path / "seen.json").read_text())
    assert (counts[-2:], rows) == ([1, 2], 64)
    assert files >= 4  # a small file is cut so that every actor gets a part


def test_blocks():
    assert [_n_blocks(*case) for case in ((0, 256, 1), (300, 256, 8), (10**4, 256, 2))] == [1, 2, 8]
    assert _n_blocks(10**6, 4096, 2) == 16


def test_a_pool_that_leaves_no_core_is_refused(cluster, tmp_path):
    source = write(tmp_path / "pairs.parquet", pairs(4))
    spec = scripted(policy_of(), actors=3)
    with pytest.raises(JudgeError, match="lower judge"):
        triage_pairs(source, tmp_path / "out", spec, None)


def test_an_endpoint_that_refuses_all_stops_the_run_with_its_reason(cluster, tmp_path):
    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(401)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args):
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        openai = {"base_url": f"http://127.0.0.1:{server.server_port}/v1"}
        config = JudgeConfig.model_validate({"kind": "openai", "model": "m", "openai": openai})
        spec = JudgeSpec(config, policy_of(), "endpoint", "digest")
        source = write(tmp_path / "pairs.parquet", pairs(4))
        with pytest.raises(JudgeError, match="answers 401 to model 'm'"):
            triage_pairs(source, tmp_path / "out", spec, None)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_review_is_unjudged_by_an_abstaining_judge(store):
    from trace_ray.types import TriagedPair

    spec = scripted(policy_of(), abstain={"p_low": 0.3, "p_high": 0.7})
    rows = [PreferencePair((Message("user", "q"),), "perhaps", "good")]
    (row,) = [TriagedPair.from_row(row) for row in judged(rows, spec, store)[0]]
    assert row.category is Category.UNJUDGED
    assert in_review(row)
