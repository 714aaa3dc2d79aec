"""What the services' words mean; whatever else they say is nonsense, and never an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.orchestrator.notices import (
    AWS_MOST_S,
    Nonsense,
    Notice,
    from_aws,
    from_azure,
    from_file,
    from_gcp,
    sentence,
    time_left,
)

NOW = datetime(2026, 11, 22, 10, 0, tzinfo=UTC)


def aws(action: str = "terminate", *, in_s: float = 100) -> str:
    return json.dumps({"action": action, "time": (NOW + timedelta(seconds=in_s)).strftime("%Y-%m-%dT%H:%M:%SZ")})


def azure(*events: dict[str, object]) -> str:
    return json.dumps({"DocumentIncarnation": 1, "Events": list(events)})


def event(kind: str = "Preempt", *machines: str, not_before: str = "Sun, 22 Nov 2026 10:00:20 GMT") -> dict[str, object]:
    return {
        "EventId": "x",
        "EventType": kind,
        "Resources": list(machines or ("vm_0",)),
        "EventStatus": "Scheduled",
        "NotBefore": not_before,
    }


def said(notice: Notice | None, now: datetime = NOW) -> str:
    assert notice
    seconds, remark = time_left(notice, now)
    return sentence(notice, 77 if seconds is None else seconds, remark)


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
def test_aws_names_the_action_and_the_time(action: str) -> None:
    assert said(from_aws(aws(action))) == f"aws: {action} in 100 s"


def test_gcp_names_no_time_so_its_thirty_seconds_count() -> None:
    assert said(from_gcp("TRUE\n")) == "gcp: preempted in 30 s"
    assert from_gcp("FALSE") is None


@pytest.mark.parametrize(
    ("kind", "not_before", "sentence_"),
    [
        ("Preempt", "Sun, 22 Nov 2026 10:00:20 GMT", "azure: Preempt in 20 s"),
        ("Terminate", "2026-11-22T10:14:00Z", "azure: Terminate in 840 s"),
        ("Preempt", "", "azure: Preempt in 30 s"),  # it has started
    ],
)
def test_azure_names_the_event_and_its_time(kind: str, not_before: str, sentence_: str) -> None:
    assert said(from_azure(azure(event(kind, not_before=not_before)), "vm_0")) == sentence_


def test_an_azure_event_of_another_machine_or_kind_is_none_of_ours() -> None:
    assert from_azure(azure(event("Preempt", "vm_1"), event("Freeze"), event("Reboot")), "vm_0") is None
    assert from_azure(azure(), "vm_0") is None


def test_of_several_azure_events_the_first_to_come_counts() -> None:
    late, early = event("Terminate", not_before="Sun, 22 Nov 2026 10:05:00 GMT"), event("Preempt", "vm_1", "vm_0")
    assert said(from_azure(azure(late, early), "vm_0")) == "azure: Preempt in 20 s"


@pytest.mark.parametrize("in_s", [-3600, 0, AWS_MOST_S + 1, 365 * 86400])
def test_a_time_that_the_service_cannot_have_meant_is_replaced_by_what_it_promises(in_s: float) -> None:
    """Its clock or ours is wrong."""
    at = (NOW + timedelta(seconds=in_s)).isoformat()
    assert said(from_aws(aws(in_s=in_s))) == f"aws: terminate in 120 s (its time {at} cannot be right here, so the least that it promises)"
    assert said(from_aws(aws("hibernate", in_s=in_s))).startswith("aws: hibernate in 0 s"), "AWS promises nothing before that"


def test_a_notice_without_a_time_that_can_be_read_counts_all_the_same() -> None:
    for time in ("soon", 17, None, [], "99999-01-01T00:00:00Z"):
        assert said(from_aws(json.dumps({"action": "stop", "time": time}))) == "aws: stop in 120 s"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "file:/n: leave in 77 s"),
        ("rack 4 goes down\n", "file:/n: rack 4 goes down in 77 s"),
        ("in 90\nrack 4\ngoes down", "file:/n: rack 4 goes down in 90 s"),
        (" IN 2.5s ", "file:/n: leave in 2 s"),
        ("in 90 days", "file:/n: in 90 days in 77 s"),
        ("x" * 999, f"file:/n: {'x' * 200} in 77 s"),
    ],
)
def test_a_file_holds_the_reason_and_perhaps_the_seconds(text: str, told: str) -> None:
    assert said(from_file(text, "/n")) == told


def test_the_same_notice_read_twice_is_one() -> None:
    assert from_aws(aws()) == from_aws(aws())
    assert from_file("in 5\nx", "/n") == from_file(" in 5 \nx\n", "/n") != from_file("in 4\nx", "/n")


@pytest.mark.parametrize(
    ("parse", "body", "message"),
    [
        (from_aws, "<html>", "aws says '<html>', which is no JSON"),
        (from_aws, "[1]", "no JSON object"),
        (from_aws, "[" * 50000, "no JSON"),
        (from_aws, '{"action": "reboot"}', "the action 'reboot', not one of terminate, stop, hibernate"),
        (from_aws, '{"action": ["stop"]}', "the action"),
        (from_gcp, "", "neither TRUE nor FALSE"),
        (lambda body: from_azure(body, "vm_0"), "{}", "not a list"),
        (lambda body: from_azure(body, "vm_0"), '{"Events": [7]}', "no JSON object"),
    ],
)
def test_what_is_no_notice_is_said_in_a_sentence(parse: Callable[[str], object], body: str, message: str) -> None:
    with pytest.raises(Nonsense, match=message.replace("[", r"\[")) as raised:
        parse(body)
    assert len(str(raised.value)) < 160


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.datetimes().map(str),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["action", "time", "Events", "x"]), inner, max_size=4),
    max_leaves=8,
)
an_event = st.fixed_dictionaries(
    {},
    optional={"EventType": st.sampled_from(["Preempt", "x"]) | anything, "Resources": st.just(["vm_0"]) | anything, "NotBefore": anything},
)
a_body = (
    st.text()
    | anything.map(json.dumps)
    | st.lists(an_event | anything, max_size=3).map(lambda events: json.dumps({"Events": events}))
    | st.tuples(st.sampled_from(["stop", "x"]), anything).map(lambda said: json.dumps(dict(zip(("action", "time"), said, strict=True))))
)


@pytest.mark.slow
@given(body=a_body)
def test_any_answer_is_a_notice_or_none_or_nonsense(body: str) -> None:
    for parse in (from_aws, from_gcp, lambda body: from_azure(body, "vm_0"), lambda body: from_file(body, "/n")):
        try:
            notice = parse(body)
        except Nonsense:
            continue
        if notice is not None:
            seconds, remark = time_left(notice, NOW)
            assert seconds is None or 0 <= seconds < 1e6
            assert sentence(notice, seconds or 0.0, remark).startswith(notice.source)
