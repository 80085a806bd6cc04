# SPDX-License-Identifier: Apache-2.0
"""What ``doctor`` prints, and what it says of a machine that can't load the package; torch-free."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal

from llm_datadist_torch.values.status import LLMLoadError, message_of
from llm_datadist_torch.values.versions import installed_versions

State = Literal["ok", "no", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: What was looked at.
        state: "ok": it works; "no": it doesn't, and something else serves; "note": for your
            information; "wrong": programs will fail because of it.
        detail: What was found, or why it doesn't work.
        remedy: What to do about it, if anything.
        commands: What to run for that, where commands do it. They are printed, never run.
    """

    name: str
    state: State
    detail: str
    remedy: str = ""
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """Everything that was found.

    Attributes:
        versions: What is installed.
        transports: What moves bytes between instances.
        paths: How the local transport reaches a peer's memory, fastest first.
        system: What the kernel and the device runtime allow.
        instance: What was found of an instance in another process, from both ends.
        examined: False if that instance could not be examined to the end.
    """

    versions: dict[str, str]
    transports: list[Finding]
    paths: list[Finding]
    system: list[Finding]
    instance: list[Finding] = field(default_factory=list)
    examined: bool = True

    @property
    def problems(self) -> list[Finding]:
        """What will make programs fail."""
        return [finding for finding in self.findings if finding.state == "wrong"]

    @property
    def exit_status(self) -> int:
        """0: nothing is wrong. 1: something is. 3: the instance could not be examined."""
        if not self.examined:
            return 3
        return 1 if self.problems else 0

    @property
    def findings(self) -> list[Finding]:
        """All of them, in the order of the report."""
        return [*self.transports, *self.paths, *self.system, *self.instance]


def as_json(report: Report) -> str:
    """The report as JSON, one line at the end."""
    return json.dumps(asdict(report) | {"problems": len(report.problems)}, indent=2) + "\n"


def as_text(report: Report) -> str:
    """The report for people."""
    width = max(len(name) for name in report.versions)
    lines = [f"{name:<{width}}  {version}" for name, version in report.versions.items()]
    for title, findings in (
        ("transports", report.transports),
        ("paths of the local transport, fastest first", report.paths),
        ("system", report.system),
        ("instance in another process", report.instance),
    ):
        if not findings:
            continue
        lines += ["", title]
        for finding in findings:
            lines.append(f"  {finding.state:<5}  {finding.name}: {finding.detail}")
            if finding.remedy:
                lines.append(f"         -> {finding.remedy}")
    problems = len(report.problems)
    lines += ["", f"{problems} problem(s)" if problems else "no problem found"]
    return "\n".join(lines) + "\n"


def as_fixes(report: Report) -> str:
    """A shell script for people to read and run: commands, and in comments what they mend.

    What is wrong comes first, and is there even if no command mends it.
    """
    lines = []
    for finding in sorted(report.findings, key=lambda finding: finding.state != "wrong"):
        if finding.commands or finding.state == "wrong":
            said = finding.commands or (f"# {finding.remedy or 'no command mends this'}",)
            lines += [f"# {finding.name}: {finding.detail}", *said]
    return "\n".join(lines or ["# nothing to fix"]) + "\n"


def of_load_error(error: LLMLoadError) -> Report:
    """The report on a machine that can't load the package."""
    finding = Finding("loading", "wrong", message_of(error), error.remedy or "")
    return Report(installed_versions(), [], [], [finding])
