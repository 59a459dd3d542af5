"""Reading data files: what each form means, and what becomes of bad rows."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trace_ray.config import load_config
from trace_ray.data import sources
from trace_ray.data.files import locate
from trace_ray.data.sources import BadRow, parse_rows
from trace_ray.errors import DataError
from trace_ray.rollout.plan import data_digest
from trace_ray.types import Category, Message, PreferencePair

USER = {"role": "user", "content": "Hi?"}
BOT = {"role": "assistant", "content": "No."}


def write_jsonl(path, rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(b"\n".join(lines) + b"\n")
    return path


def reply(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."},
        {"prompt": [USER], "chosen": "Yes.", "rejected": "No."},
        {"prompt": [USER], "chosen": reply("Yes."), "rejected": reply("No.")},
        {"chosen": [USER, *reply("Yes.")], "rejected": [USER, BOT]},
        {"prompt": "Hi?", "chosen": [USER, *reply("Yes.")], "rejected": [USER, BOT]},
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_pairs_in_every_form(tmp_path, row, suffix):
    path = tmp_path / f"data.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        write_jsonl(path, [row])
    expected = PreferencePair((Message("user", "Hi?"),), "Yes.", "No.", f"{path}:1")
    assert list(parse_rows(path, "pairs")) == [expected]


GOOD = {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}


@pytest.mark.parametrize(
    ("row", "field", "message"),
    [
        (b'{"prompt": ', "", "is not JSON"),
        (b'{"prompt": "\xff"}', "", "is not UTF-8"),
        (b"[" * 100_000, "", "nested too deep"),
        ([1], "", "must be a JSON object"),
        (GOOD | {"prompt": None}, "prompt", "share no conversation|missing"),
        ({"prompt": "Hi?", "chosen": "Yes."}, "rejected", "missing"),
        (GOOD | {"chosen": "  "}, "chosen", "is empty"),
        (GOOD | {"chosen": 3}, "chosen", "must be text or a list"),
        (GOOD | {"chosen": "No."}, "rejected", "same text"),
        (GOOD | {"chosen": "\ud800"}, "chosen", "surrogate"),
        (GOOD | {"prompt": [BOT]}, "prompt", "must end with a user message"),
        (GOOD | {"prompt": [{"role": "bot", "content": "x"}]}, "prompt[0].role", "one of"),
        (GOOD | {"prompt": [{"role": "user", "content": 1}]}, "prompt[0].content", "must be text"),
        (GOOD | {"chosen": [USER]}, "chosen", "must end with an assistant"),
        (GOOD | {"prompt": "Else?", "chosen": [USER, BOT]}, "chosen", "are not the prompt"),
    ],
)
def test_bad_row_names_its_field(tmp_path, row, field, message):
    path = write_jsonl(tmp_path / "data.jsonl", [b"", GOOD, row])
    good, bad = parse_rows(path, "pairs")
    assert isinstance(good, PreferencePair)
    assert isinstance(bad, BadRow)
    assert (bad.file, bad.line, bad.field) == (str(path), 3, field)
    assert any(part in bad.message for part in message.split("|"))
    assert 0 < len(bad.raw) <= 500


def dialogue(*turns):
    return "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {t}" for i, t in enumerate(turns))


def test_hh_dialogues(tmp_path):
    row = {
        "chosen": dialogue("a", "b", "c\n\nd", "yes"),
        "rejected": dialogue("a", "b", "c\n\nd", "no"),
    }
    path = write_jsonl(tmp_path / "hh.jsonl.gz", [row])
    (pair,) = parse_rows(path, "hh-rlhf")
    assert isinstance(pair, PreferencePair)
    assert [m.role for m in pair.prompt] == ["user", "assistant", "user"]
    assert [m.content for m in pair.prompt] == ["a", "b", "c\n\nd"]
    assert (pair.chosen, pair.rejected) == ("yes", "no")


@pytest.mark.parametrize(
    ("chosen", "rejected", "field"),
    [
        (dialogue("a", "yes"), dialogue("b", "no"), "rejected"),
        (dialogue("a", "yes"), dialogue("a", "no", "c"), "rejected"),
        (dialogue("a", ""), dialogue("a", "no"), "chosen, turn 2"),
        ("just text", dialogue("a", "no"), "chosen"),
        (dialogue("a"), dialogue("a"), "chosen"),
    ],
)
def test_hh_bad_rows(tmp_path, chosen, rejected, field):
    path = write_jsonl(tmp_path / "hh.jsonl", [{"chosen": chosen, "rejected": rejected}])
    (bad,) = parse_rows(path, "hh-rlhf")
    assert isinstance(bad, BadRow)
    assert bad.field == field


def test_truncated_files_name_themselves(tmp_path):
    path = write_jsonl(tmp_path / "cut.jsonl.gz", [GOOD | {"prompt": f"{i}?"} for i in range(2000)])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: its gzip stream breaks after line"):
        list(parse_rows(path, "pairs"))
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"broken\.parquet: can't be read as parquet"):
        list(parse_rows(broken, "pairs"))


def test_local_files_folders_and_globs(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.parquet", "deep/c.jsonl.gz", "notes.txt", ".d.jsonl"):
        (tmp_path / name).write_text("")

    def names(source):
        return [file.name.removeprefix(f"{tmp_path}/") for file in locate(source).files]

    assert names(tmp_path) == ["a.parquet", "b.jsonl", "deep/c.jsonl.gz"]
    assert names(tmp_path / "*.jsonl") == ["b.jsonl"]
    assert names(tmp_path / "**" / "*.gz") == ["deep/c.jsonl.gz"]
    monkeypatch.chdir(tmp_path)
    assert names("b.jsonl") == ["b.jsonl"]
    for source, text in (
        ("none/*.jsonl", "no such file, and as a glob it matches no data file"),
        ("notes.txt", "must be one of .jsonl"),
    ):
        with pytest.raises(DataError, match=text):
            locate(tmp_path / source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: directory holds no data file"):
        locate("empty")


def test_the_digest_of_local_files_follows_their_bytes(tmp_path):
    (tmp_path / "policy.yaml").write_text("")
    (tmp_path / "fleet.yaml").write_text(
        "policy: policy.yaml\ndata: {source: pairs.jsonl}\ntraining: {objective: sft}\n"
        f"models: [{{name: a, base: b}}]\nstorage: {tmp_path}/storage\n"
    )
    path = write_jsonl(tmp_path / "pairs.jsonl", [GOOD])

    def digest():
        config = load_config(tmp_path / "fleet.yaml")
        return data_digest(config, locate(config.data.source))

    first = digest()
    path.touch()
    assert digest() == first
    write_jsonl(path, [GOOD | {"prompt": "Hi!"}])
    assert digest() != first


def test_small_files(tmp_path):
    labels = [
        {"prompt": "Hi?", "response": "No.", "verdict": "violates", "group": "g"},
        {"prompt": [USER], "response": "Yes.", "verdict": "complies"},
    ]
    one, two = sources.read_labels(write_jsonl(tmp_path / "l.jsonl", labels))
    assert (one.violates, one.group, two.violates, two.group) == (True, "g", False, "")
    path = write_jsonl(
        tmp_path / "e.jsonl", [{"prompt": "a", "bin": "invert", "must_mention": ["x"]}]
    )
    (item,) = sources.read_eval_prompts(path)
    assert (item.bin, item.must_mention) == (Category.INVERT, ("x",))
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}])
    assert sources.read_prompts(path) == [(Message("user", "a"),)]
    path = write_jsonl(tmp_path / "g.jsonl", [{"pair_id": "1", "category": "punish"}])
    assert sources.read_gold(path) == {"1": Category.PUNISH}


def test_small_files_report_all_problems(tmp_path):
    path = write_jsonl(tmp_path / "l.jsonl", [{"prompt": "a"}] * 25)
    with pytest.raises(DataError) as caught:
        sources.read_labels(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}:1: verdict: missing"
    assert lines[-1] == "... and 5 more"
    assert len(lines) == 21
    with pytest.raises(DataError, match=r"none\.jsonl: can't be read: No such file"):
        sources.read_gold(tmp_path / "none.jsonl")
