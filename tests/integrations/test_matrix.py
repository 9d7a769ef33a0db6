"""The table of integrations in the documentation: complete, and what the cases give."""

from __future__ import annotations

import pytest

from benchmarks.integrations.__main__ import INTEGRATIONS
from benchmarks.integrations.architectures import ARCHITECTURES
from benchmarks.integrations.cases import CASES, compiled
from benchmarks.integrations.outcomes import key_of, outcome_of
from benchmarks.integrations.setting import Setting
from benchmarks.results import read
from benchmarks.tables import ROOT, render

SLOW = {"`torch.compile`, one graph", "`torch.export`", "`Trainer`, resumed"}
"""Seconds each: run here on some architectures, on all by `python -m benchmarks.integrations`."""
QUICK = [name for name in CASES if name not in SLOW]


def recorded() -> dict[tuple[str, str], dict[str, str]]:
    records = {key_of(record): record for record in read("integrations")}
    return {key: {"outcome": record["outcome"], "reason": record["reason"]} for key, record in records.items()}


def test_nothing_is_untested():
    assert set(recorded()) == {(integration, name) for integration in INTEGRATIONS for name in ARCHITECTURES}
    assert all(found["reason"] for found in recorded().values() if found["outcome"] != "works")
    assert {found["outcome"] for found in recorded().values()} == {"works", "refused"}


def test_the_table_is_that_of_the_records():
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    assert "<!-- table: integrations -->" in page
    assert render(page) == page


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:transformers.*")
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_the_records_are_what_the_cases_give(architecture, capfd):
    expected = recorded()
    for integration in QUICK:
        found = outcome_of(CASES[integration], architecture)
        assert found == expected[integration, architecture], integration


@pytest.mark.parametrize("integration", ["`torch.export`", "`Trainer`, resumed"])
@pytest.mark.parametrize("architecture", ["ViT", "CLIP, both towers"])
def test_slow_cases(integration, architecture):
    assert outcome_of(CASES[integration], architecture) == recorded()[integration, architecture]


def test_gated_activations_compile_in_one_graph():
    compiled(Setting.of("Llama"))  # the tables of SiLU in a traced graph


def test_a_case_that_fails_is_no_refusal():
    def broken(setting: Setting) -> None:
        raise AssertionError("wrong numbers")

    with pytest.raises(AssertionError, match="wrong numbers"):
        outcome_of(broken, "ViT")
