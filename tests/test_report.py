"""What a run prints at its end."""

from rich.console import Console

from trace_ray.rollout.report import summary_table, triage_line


def printed(report):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(summary_table(report))
    return capture.get()


def report_of(*truncated):
    models = [
        {"name": f"m{i}", "registered_as": "r/1", "rows": 24, "truncated": n, "alike": n // 2}
        for i, n in enumerate(truncated)
    ]
    models = [model | {"tpa_before": None} for model in models]
    policy = {"id": "acme", "version": "2"}
    return {"policy": policy, "models": models, "failed": {}, "unchanged": {}, "triage": None}


def test_rows_that_were_cut_are_in_the_table_where_there_are_any():
    cut = printed(report_of(0, 3))
    assert "rows cut" in cut
    assert "3 of 24, 1 with both sides alike" in cut
    assert "0 of 24 " in cut
    assert "cut" not in printed(report_of(0, 0))


def test_an_error_is_shown_as_it_is():
    report = report_of(0) | {"failed": {"b": "no [/INST] in [enforce fail]"}}
    assert "failed: no [/INST] in [enforce fail]" in printed(report)


def test_an_oracle_that_failed_is_in_the_triage_line():
    names = ("pairs", "invert", "punish", "retain", "unjudged", "review", "judge_calls")
    triage = dict.fromkeys((*names, "cache_hits"), 5) | {"judge": {"name": "rules", "auc": None}}
    report = report_of(0) | {"triage": triage}
    report["corrections"] = {"asked": 5, "accepted": 2, "failed": {"the endpoint answers 500": 3}}
    line = triage_line(report)
    assert line is not None
    assert "2 of 5 punish pairs corrected, the rest by NPO" in line
    assert line.endswith("; oracle failed at 3: the endpoint answers 500")
    report["corrections"] |= {"failed": {}, "unanswered": {"oracle": 0, "judge": 2}}
    line = str(triage_line(report))
    assert "failed" not in line
    assert line.endswith("; 2 of the rest got no answer (the judge at 2): the next run asks again")
    report["corrections"]["unanswered"] = {"oracle": 0, "judge": 0}
    assert "no answer" not in str(triage_line(report))
