"""Checks whether the Hugging Face hub answers."""

from __future__ import annotations

__all__ = ["SECONDS", "answers"]

SECONDS = 4.0
"""Seconds without an answer after which the hub counts as unreachable."""


def answers(name: str) -> bool:
    """Return whether the hub answers a question about a model, even if the answer is that there is no such model.

    Without this check, the hub's client would wait for a very long time when offline.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(name, timeout=SECONDS)
    except HfHubHTTPError:
        return True
    except Exception:  # the hub's client raises many kinds of exceptions when offline
        return False
    return True
