"""The hash chain: whatever is done to it is found."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_ray.core.audit import AuditHead, AuditRecord, chain_problems, chained, head_of

KEY = b"a key"
texts = st.text(max_size=5)
contents = st.lists(
    st.tuples(texts, texts, st.dictionaries(texts, texts, max_size=2)), min_size=1, max_size=6
)


def chain(items) -> list[AuditRecord]:
    records = []
    for who, what, inputs in items:
        head = head_of(records)
        records.append(
            chained(head, "2026-01-01T00:00:00Z", who, what, inputs, {"n": len(records)})
        )
    return records


@given(contents)
def test_a_whole_chain_has_no_problem(items):
    records = chain(items)
    assert chain_problems(records, head_of(records).signed(KEY), KEY) == []
    assert [AuditRecord.from_row(r.to_row()) for r in records] == records


@given(contents, st.data())
def test_any_edit_drop_reorder_insert_or_cut_is_found(items, data):
    records = chain(items)
    head = head_of(records).signed(KEY)
    place = data.draw(st.integers(0, len(records) - 1))
    kind = data.draw(st.sampled_from(["edit", "drop", "swap", "repeat", "cut"]))
    broken = list(records)
    if kind == "edit":
        name = data.draw(st.sampled_from(["who", "what", "at", "previous", "digest"]))
        broken[place] = replace(records[place], **{name: getattr(records[place], name) + "x"})
    elif kind == "drop":
        del broken[place]
    elif kind == "swap":
        other = data.draw(st.integers(0, len(records) - 1).filter(lambda i: i != place or i == 0))
        if other == place:
            return
        broken[place], broken[other] = broken[other], broken[place]
    elif kind == "repeat":
        broken.insert(place, records[place])
    else:
        broken = broken[:place]
    assert chain_problems(broken, head, KEY)


def test_a_rewritten_chain_needs_the_key():
    records = chain([("a", "promote", {}), ("b", "rollback", {})])
    forged = chain([("a", "promote", {})])
    assert chain_problems(forged, head_of(forged)) == []
    for head in (head_of(forged), head_of(forged).signed(b"guess")):
        assert "signature" in chain_problems(forged, head, KEY)[0]
    assert chain_problems(records, AuditHead(1, records[0].digest)) == []  # killed before the head


@pytest.mark.parametrize("field", ["inputs", "evidence"])
def test_an_edited_mapping_is_found(field):
    records = chain([("a", "promote", {"x": "1"})])
    edited = [replace(records[0], **{field: {"x": "2"}})]
    assert "edited" in chain_problems(edited, head_of(records))[0]
