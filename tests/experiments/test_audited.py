"""``make audit`` names what is known, and how much was not looked up."""

from __future__ import annotations

from experiments.audited import said


def test_a_vulnerability_is_named_and_counted() -> None:
    bad = {"name": "a", "version": "1.0", "vulns": [{"id": "CVE-1", "fix_versions": ["1.1"]}]}
    unknown = {"name": "b", "skip_reason": "no index"}
    lines, count = said([bad, unknown])
    assert count == 1
    assert lines[0] == "a 1.0: CVE-1, mended in 1.1"
    assert lines[1].startswith("1 of 2 packages were looked up, 1 could not be")


def test_nothing_looked_up_is_said() -> None:
    lines, count = said([{"name": "b", "skip_reason": "no index"}])
    assert (count, lines[0][:39]) == (0, "0 of 1 packages were looked up, 1 could")
