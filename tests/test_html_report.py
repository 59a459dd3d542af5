"""The page of a run: self-contained, and safe whatever a model answered."""

import re
from html.parser import HTMLParser

import pytest
from chromium import needs_chromium, opened

from trace_ray.config import GateSection
from trace_ray.core.policy import parse_policy
from trace_ray.rollout.gate import gate_row
from trace_ray.rollout.html_report import render
from trace_ray.runtime.audit_log import AuditLog
from trace_ray.runtime.store import write_json, write_rows
from trace_ray.types import Category, EvalPrompt, Message

EVIL = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)><svg onload=alert(1)>',
    "</div></body><iframe src='https://evil.example'></iframe>",
    "{{ 7 * 7 }}{% raw %}",
    "right \u202eorder\x00",
]
CHECKS = {"must_not_match": "script"}
POLICY = {
    "id": "acme",
    "version": "2",
    "clauses": [
        {"id": "no-script", "text": "None.", "checks": CHECKS},
        {"id": "polite", "text": "Be polite."},
    ],
}
ONE = {"value": 0.5, "ci_low": 0.25, "ci_high": 0.75, "n": 5}
RATES = {"asr": ONE, "direct": ONE, "wrappers": dict.fromkeys(EVIL, ONE), "unjudged": 1}


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a run whose every free text tries to break out."""
    at = tmp_path_factory.mktemp("run")
    policy = parse_policy(POLICY, "policy.yaml")
    item = EvalPrompt((Message("user", f"hello {EVIL[1]}"),), Category.INVERT)
    answers = [
        item.to_row()
        | {"before": text, "after": "fine", "before_agrees": i > 0, "after_agrees": True}
        for i, text in enumerate([*EVIL, "long " * 900])
    ]
    write_rows(at / "answers.parquet", answers)
    said = {"before": [False] * len(answers), "after": [True] * (len(answers) - 1) + [None]}
    write_json(at / "outcomes.json", {"clauses": {"polite": said}})
    (at / "adapter").mkdir()
    log = [{"loss": 1 / step, "step": step} for step in range(1, 9)]
    write_json(at / "history.json", {"log": [*log, {"train_runtime": 1}]})
    scores = [{"model": "one", "raw": 0.1, "weight": w / 3} for w in range(4)]
    rows = [{"category": "punish", "scores": [score]} for score in scores]
    write_rows(at / "triaged.parquet", [*rows, {"category": "retain", "scores": []}])
    audit = AuditLog(at / "audit")
    audit.append("promote", {}, {"forced": EVIL[0], "models": [{"name": EVIL[1], "gate": "hold"}]})
    model = {
        "name": "one",
        "adapter_id": "one@2-aaaaaaaa",
        "registered_as": "trace-one/2",
        "rows": 5,
        "truncated": 0,
        "alike": 0,
        "pairs_per_s": 1.5,
        "wall_s": {"score": None, "train": 3.2, "measure": 1},
        "tpa_before": ONE,
        "tpa_after": ONE,
        "tpa_gain": ONE,
        "asr": {"before": RATES, "after": RATES, "difference": ONE},
        "bins": {"invert": ONE | {"before": ONE}},
        "retention": {
            "kl": 0.2,
            "blimp_before": None,
            "blimp_after": None,
            "distinct2_before": 0.5,
            "distinct2_after": 0.4,
        },
        "answers_path": str(at / "answers.parquet"),
        "adapter_path": str(at / "adapter"),
        "gate": gate_row(policy, str(at / "answers.parquet"), GateSection()),
    }
    bare = dict.fromkeys(model) | {"name": "two", "rows": 1, "truncated": 0}
    bare |= {"wall_s": model["wall_s"], "adapter_id": "two@2-bbbbbbbb"}
    report = {
        "run_id": "acme-2-1",
        "policy": {"id": policy.id, "version": "2", "digest": policy.digest},
        "data": {"rows": 5, "quarantined": 0},
        "triage": {
            "pairs": 5,
            "invert": 1,
            "punish": 4,
            "retain": 0,
            "unjudged": 0,
            "review": 0,
            "judge_calls": 5,
            "cache_hits": 0,
            "judge": {"name": EVIL[0], "auc": None, "n_test": 0},
        },
        "models": [model, bare],
        "judges": {
            "triage": EVIL[0],
            "gate": EVIL[1],
            "same": [EVIL[0]],
            "agreement": {"kappa": ONE, "same": ONE, "n": 5, "left_out": 1},
        },
        "failed": {"three": EVIL[0]},
        "unchanged": {"four": "no pair conflicts with the policy"},
        "wall_s": 12.0,
    }
    (at / "report.html").write_text(render(report, at, policy, AuditLog(at / "audit")))
    return at / "report.html"


def test_a_clause_without_checks_is_on_the_page_as_the_judge_saw_it(page):
    text = "".join("".join(Page(page.read_text()).text).split())
    assert "politestandard0%→100%" in text


def test_nothing_a_model_wrote_becomes_markup(page):
    found = Page(page.read_text())
    assert not {"script", "img", "iframe", "object", "link", "b"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    text = "".join(found.text)
    for each in EVIL[:4]:
        assert each in text
    assert "\u202e" not in text
    assert "right \ufffdorder\ufffd" in text
    assert "more characters)" in text
    policies = [value for name, value in found.attributes if name == "content"]
    assert "default-src 'none'; style-src 'unsafe-inline'" in policies


def test_no_external_request_can_be_made(page):
    found = Page(page.read_text())
    assert not [value for _, value in found.attributes if re.search(r"https?:|url\(", value or "")]
    assert not [name for name, _ in found.attributes if name in ("src", "href", "srcset", "action")]
    style = page.read_text().partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style


def test_everything_is_there(page):
    found = Page(page.read_text())
    text = "".join(found.text)
    for part in ("Before and after", "Clauses", "old preferences", "Impact", "Training", "kept"):
        assert part in text
    for part in ("most changed answers", "Decisions", "Costs", "failed: <script>", "not measured"):
        assert part in text
    for part in (
        "Under attack",
        "Who judged",
        "kappa 0.50 [0.25, 0.75]",
        "the gate is not held out",
    ):
        assert part in " ".join(text.split())
    assert found.tags.count("svg") == 5
    assert not [value for name, value in found.attributes if name == "id"]
    assert "does not agree → agrees" in text


@needs_chromium
def test_it_renders_in_chromium_without_an_error_light_dark_on_a_phone_and_in_print(page):
    _, complaints = opened(page.as_uri(), "Who judged", "report")
    assert complaints == []
