"""The probe on a real model and real text: minutes, so only under ``make test-all``."""

from __future__ import annotations

import json

import pytest

from rankloom.attention.report import Report
from rankloom.cli import main


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smollm2_has_270_heads_and_few_of_them_are_below_the_threshold(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["limits", "probe", "--model", "smollm2-135m", "--data", "pydoc-topics", "--tokens", "512", "--quiet"]
    assert main([*words, "--lengths", "2048,131072", "--json"]) == 0
    report = Report.from_dict(json.loads(capfd.readouterr().out))
    assert [(h.layer, h.head, h.group) for h in report.heads] == [(i, j, j // 3) for i in range(30) for j in range(9)]
    assert report.loss and report.held_out and report.tokens == 512
    for head in report.heads:
        assert 0 < head.logit_std < head.logit_range and 1 <= head.effective_dimension <= 64
    # Large norms, and a gradient that no narrow factor reproduces: the probe has to say so, not to pretend.
    assert report.count(131072)["exact"] >= 0.9 * len(report.heads)
    assert sum(head.below(131072) for head in report.heads) <= 0.1 * len(report.heads)
    # The output is the easier part.
    assert report.count(131072, output=True)["exact"] <= report.count(131072)["exact"]
