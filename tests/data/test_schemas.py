"""What each schema makes of a row, and which field it blames."""

import typing

import pytest

from trace_ray.config import DataConfig, FleetConfig, SchemaName
from trace_ray.data.schemas import SCHEMAS, FieldError, needed_columns, pair_reader, schema_of
from trace_ray.errors import DataError
from trace_ray.types import Message

PKU = {
    "prompt": "Q?",
    "response_0": "zero",
    "response_1": "one",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 1,
    "safer_response_id": 0,
}


@pytest.mark.parametrize(
    ("safe", "safer", "chosen"),
    [
        ((True, False), 0, "zero"),
        ((True, False), 1, "zero"),  # the one safe response wins over the label
        ((False, True), 0, "one"),
        ((True, True), 0, "zero"),
        ((True, True), 1, "one"),
        ((False, False), 0, "zero"),
        ((False, False), 1, "one"),
    ],
)
def test_pku_picks_as_the_reference_does(safe, safer, chosen):
    names = ("is_response_0_safe", "is_response_1_safe")
    row = PKU | dict(zip(names, safe, strict=True)) | {"safer_response_id": safer}
    pair = pair_reader("pku-saferlhf")(row, "")
    assert {pair.chosen, pair.rejected} == {"zero", "one"}
    assert pair.chosen == chosen


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"safer_response_id": -1}, "safer_response_id"),
        ({"safer_response_id": None}, "safer_response_id"),
        ({"safer_response_id": True}, "safer_response_id"),
        ({"safer_response_id": [0]}, "safer_response_id"),
        ({"is_response_1_safe": "no"}, "is_response_1_safe"),
        ({"response_1": ""}, "response_1"),
        ({"response_1": "zero"}, "rejected"),
    ],
)
def test_pku_rows_that_state_no_preference(change, field):
    with pytest.raises(FieldError) as caught:
        pair_reader("pku-saferlhf")(PKU | change, "")
    assert caught.value.field == field


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": turns("a"), "chosen": turns("a", "yes")[1:], "rejected": turns("a", "no")[1:]},
        {"chosen": turns("a", "yes"), "rejected": turns("a", "no")},
        {"prompt": turns("a"), "chosen": turns("a", "yes"), "rejected": turns("a", "no")},
    ],
)
def test_messages(row):
    pair = pair_reader("messages")(row, "")
    assert (pair.prompt, pair.chosen, pair.rejected) == ((Message("user", "a"),), "yes", "no")
    for name in row:
        with pytest.raises(FieldError) as caught:
            pair_reader("messages")(row | {name: "text"}, "")
        assert caught.value.args == (name, "must be a list of chat messages (got str)")


def test_a_column_map_reads_and_blames_the_rows_own_names():
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    read = pair_reader(columns)
    row = {"question": "a", "good": "yes", "bad": "no", "prompt": "another thing"}
    pair = read(row, "f:1")
    assert (pair.prompt[0].content, pair.chosen, pair.rejected, pair.source) == (
        "a",
        "yes",
        "no",
        "f:1",
    )
    for change, field in (
        ({"question": None}, "question"),
        ({"good": " "}, "good"),
        ({"bad": [{"role": "x"}]}, "bad[0].role"),
    ):
        with pytest.raises(FieldError) as caught:
            read(row | change, "")
        assert caught.value.field == field
    implicit = pair_reader({"chosen": "good", "rejected": "bad"})
    assert implicit({"good": turns("a", "yes"), "bad": turns("a", "no")}, "").chosen == "yes"


def test_config_takes_names_and_maps():
    assert set(typing.get_args(SchemaName)) == set(SCHEMAS)
    assert DataConfig.model_validate({"source": "x"}).row_schema == "pairs"
    columns = {"chosen": "good", "rejected": "bad"}
    config = DataConfig.model_validate({"source": "x", "schema": columns})
    assert config.row_schema == columns
    assert needed_columns(config.row_schema) == ("good", "bad")
    assert DataConfig.model_validate_json(config.model_dump_json(by_alias=True)) == config


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        (
            "dpo",
            "data.schema.name: Input should be 'pairs', 'hh-rlhf', 'pku-saferlhf' or 'messages'",
        ),
        ({"chosen": "a"}, "data.schema.columns.rejected: Field required"),
        (
            {"chosen": "a", "rejected": "b", "answer": "c"},
            "data.schema.columns.answer: unknown key",
        ),
    ],
)
def test_config_names_a_schema_that_can_not_be(tmp_path, schema, problem):
    import yaml

    from trace_ray.config import load_config
    from trace_ray.errors import ConfigError

    raw = {
        "policy": "p.yaml",
        "data": {"source": "x", "schema": schema},
        "training": {"objective": "sft"},
        "models": [{"name": "a", "base": "b"}],
    }
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "fleet.yaml")
    assert [line for line in str(caught.value).splitlines() if problem in line]
    assert FleetConfig.model_fields["data"].annotation is DataConfig


def test_schema_of_a_commands_argument():
    assert schema_of("hh-rlhf") == "hh-rlhf"
    assert schema_of("chosen=good,rejected=bad") == {"chosen": "good", "rejected": "bad"}
    for text in ("dpo", "chosen=good", "chosen=good,rejected=", "chosen=a,rejected=b,answer=c"):
        with pytest.raises(DataError, match="must be one of pairs, hh-rlhf"):
            schema_of(text)
