"""Chat: a model, compressed or not, answers prompts word by word.

Knows models, their tokenizers and text; where prompts come from and where answers go is its caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from search.model.latent_cache import latent_cache
from search.model.loading import LoadedModel

__all__ = ["Chat", "Spoken"]


@dataclass
class Chat:
    """A conversation.

    Attributes:
        tokens: an answer is at most this long.
        temperature: 0 always takes the likeliest token; otherwise tokens are drawn at this temperature.
        latent: keep latents instead of keys and values, see `search.model.latent_cache`.
        turns: what was said, as chat templates want it.
    """

    loaded: LoadedModel
    tokens: int = 256
    temperature: float = 0.0
    latent: bool = False
    turns: list[dict[str, str]] = field(default_factory=list)

    @torch.inference_mode()
    def answer(self, prompt: str, say: Callable[[str], None]) -> str:
        """The answer to a prompt, in the light of earlier turns; `say` is given its pieces as they come.

        A model without a chat template just goes on with the prompt, and forgets it.
        """
        tokenizer, model = self.loaded.tokenizer, self.loaded.model
        if tokenizer.chat_template:
            self.turns.append({"role": "user", "content": prompt})
            encoded: Mapping[str, torch.Tensor] = tokenizer.apply_chat_template(
                self.turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            encoded = tokenizer(prompt, return_tensors="pt")
        ids = encoded["input_ids"].to(model.device)
        spoken = Spoken(tokenizer.decode, say)
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.temperature}
        with latent_cache(model) if self.latent else nullcontext() as cache:
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.tokens,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                streamer=spoken,
                past_key_values=cache,
                **sampling,
            )
        if tokenizer.chat_template:
            self.turns.append({"role": "assistant", "content": spoken.text})
        return spoken.text


class Spoken:
    """What transformers' `generate` takes as streamer: turns tokens into text as far as it is certain.

    The last character of a text waits while it may be half of one that the next token completes.
    """

    def __init__(self, decode: Callable[..., str], say: Callable[[str], None]) -> None:
        self._decode, self._say = decode, say
        self._tokens: list[int] = []
        self._prompted = False
        self.text = ""

    def put(self, tokens: torch.Tensor) -> None:
        """New tokens of the one sequence; the first call brings the prompt."""
        if not self._prompted:
            self._prompted = True
            return
        self._tokens += tokens.flatten().tolist()
        self._tell(self._text().rstrip("\N{REPLACEMENT CHARACTER}"))

    def end(self) -> None:
        """No more tokens come."""
        self._tell(self._text())

    def _text(self) -> str:
        return self._decode(self._tokens, skip_special_tokens=True)

    def _tell(self, text: str) -> None:
        if len(text) > len(self.text):
            self._say(text[len(self.text) :])
            self.text = text
