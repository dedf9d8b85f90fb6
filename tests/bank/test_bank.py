"""A minute with the bank; ``python -m tests.bank 600`` is the longer form."""

from __future__ import annotations

import pytest

from tests.bank.proxy import MESSAGES
from tests.bank.run import run

SEED = 20_260
SECONDS = 60.0


@pytest.mark.timeout(240)
def test_everyone_was_told_the_truth() -> None:
    report = run(SECONDS, SEED)
    print(f"\n{report}")
    assert not report.findings, f"{report.evidence}\n{report}"
    # Or nothing was proved.
    assert report.outcomes["committed"] > 50
    assert sum(report.faults.values()) > 20
    assert report.snapshots
    cut = {what.rpartition(" ")[0] for what in report.cuts}
    assert cut == {*MESSAGES}
