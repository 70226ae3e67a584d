"""What accelerated attention did, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

__all__ = ["summary"]


def summary(report: Mapping[str, Any]) -> str:
    """Lines about a report of :class:`~rankloom.attention.accelerate.AcceleratedAttention`: how many heads are accelerated, what
    measuring took and saved, who waits for it and why, and how much of the attention ran how."""
    heads, account, ran = report["heads"], report["budget"], Counter(report["ran"])
    accelerated = sum(head["accelerated"] for head in heads)
    lines = [f"attention within {report['eps']:g}: {accelerated} of {len(heads)} key heads are accelerated"]
    if account["exact"]:
        spent, saved = (100 * account[name] / account["exact"] for name in ("spent", "saved"))
        lines.append(
            f"  of exact attention's predicted time {spent:.1f} % went into measuring and {saved:.1f} % was saved"
        )
    put_off = Counter(head["put_off"] for head in heads if head["put_off"])
    lines += [f"  measurements put off: {count} key heads ({why})" for why, count in put_off.most_common()]
    lines += [f"  {100 * times / ran.total():5.1f} %  {what}" for what, times in ran.most_common()]
    return "\n".join(lines)
