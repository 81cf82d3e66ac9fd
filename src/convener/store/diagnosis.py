"""What an examination of a store has found: plain data, made below and shown above."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["safe", "reduced", "refused", "unknown"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: its name, which is stable.
        verdict: `safe`; `reduced`: it works, and something is not as safe or as quick as it could be; `refused`: data
            will be lost, or nothing works; `unknown`: the store hides it.
        says: what was found, in words.
        advice: what to do about it, "" for nothing.
    """

    check: str
    verdict: Verdict
    says: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings, in the order in which they are shown."""

    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        """`refused` if anything is, else `reduced` if anything is, else `safe`: what is hidden condemns nobody."""
        verdicts = {finding.verdict for finding in self.findings}
        return "refused" if "refused" in verdicts else "reduced" if "reduced" in verdicts else "safe"
