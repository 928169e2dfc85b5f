"""A check as JUnit XML, the form that CI servers read: a test case per column."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from xml.etree import ElementTree as ET

from sdft.drift.verdict import Verdict

SUITE = "sdft check"
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(verdicts: Sequence[Verdict], facts: dict[str, str]) -> str:
    """The document: what fell is a failure, what could not be scored an error.

    Args:
        verdicts: The columns.
        facts: Properties of the suite, such as the model's name.
    """
    counts = {
        "tests": len(verdicts),
        "failures": sum(verdict.outcome == "fell" for verdict in verdicts),
        "errors": sum(verdict.outcome == "unscored" for verdict in verdicts),
        "time": f"{sum(verdict.seconds for verdict in verdicts):.3f}",
    }
    attributes = {key: str(value) for key, value in counts.items()}
    root = ET.Element("testsuites", {"name": SUITE, **attributes})
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S")
    suite = ET.SubElement(
        root, "testsuite", {"name": SUITE, "skipped": "0", "timestamp": stamp, **attributes}
    )
    properties = ET.SubElement(suite, "properties")
    for key, value in facts.items():
        ET.SubElement(properties, "property", {"name": key, "value": _clean(value)})
    for verdict in verdicts:
        _case(suite, verdict)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, "unicode") + "\n"


def _case(suite: ET.Element, verdict: Verdict) -> None:
    kind = "suite" if verdict.is_suite else "task"
    case = ET.SubElement(
        suite,
        "testcase",
        {
            "classname": f"sdft.{kind}",
            "name": _clean(verdict.name),
            "time": f"{verdict.seconds:.3f}",
        },
    )
    tag = {"fell": "failure", "unscored": "error"}.get(verdict.outcome)
    if tag is not None:
        reason = _clean(verdict.reason)
        found = ET.SubElement(case, tag, {"message": reason, "type": verdict.outcome})
        found.text = reason
    out = ET.SubElement(case, "system-out")
    out.text = _clean("\n".join([verdict.reason, *verdict.remarks]))


def _clean(text: str) -> str:
    """Without what XML cannot hold."""
    return _FORBIDDEN.sub("\ufffd", text)
