"""Our `replace` against that of the standard library."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.orchestrator.changing import replace
from keepstep.orchestrator.machine import begin
from keepstep.orchestrator.membership import Members
from keepstep.orchestrator.policy import Policy

CHANGES: Any = st.dictionaries(
    st.sampled_from(["now", "term", "stop", "out", "committed_at", "members"]), st.just(Members()) | st.integers()
)


@given(CHANGES)
def test_it_is_the_standard_librarys(changes: dict[str, Any]) -> None:
    run = begin(Policy(steps=100))
    copied = replace(run, **changes)
    assert copied == dataclasses.replace(run, **changes)
    assert run == begin(Policy(steps=100)), "the original stays"
    with pytest.raises(dataclasses.FrozenInstanceError):
        copied.now = 1.0  # type: ignore[misc]


def test_a_field_that_is_not_there() -> None:
    with pytest.raises(KeyError, match="nodez"):
        replace(Members(), nodez=())  # type: ignore[call-arg]


def test_a_class_that_checks_its_fields_is_refused() -> None:
    with pytest.raises(AssertionError, match="Policy checks its fields"):
        replace(Policy(steps=100), nodes=0)
