"""The model hub: whether it answers, and uploads of a folder, when told to."""

from __future__ import annotations

__all__ = ["SECONDS", "answers"]

SECONDS = 4.0
"""How long the hub may stay silent at first contact before we say that it cannot be reached."""


def answers(name: str) -> bool:
    """Whether the hub says anything when asked for a model, be it that there is none; the library itself would wait
    for ever."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(name, timeout=SECONDS)
    except HfHubHTTPError:
        return True
    except Exception:  # offline, the hub's client raises many kinds
        return False
    return True
