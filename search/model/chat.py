"""Chat with a model, compressed or not: answer prompts and stream the text.

Knows models, their tokenizers and text; does not know where prompts come from or where answers go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from compression.refusal import Refusal
from search.data.conversations import apply_template
from search.model.latent_cache import latent_cache
from search.model.loading import LoadedModel
from search.runtime.files import is_text

__all__ = ["Chat", "Spoken"]


@dataclass
class Chat:
    """A conversation with a model.

    Attributes:
        loaded: the model and its tokenizer.
        tokens: most tokens of an answer.
        temperature: 0 always takes the likeliest token; otherwise tokens are sampled at this temperature.
        latent: whether the KV cache stores latents instead of keys and values, see `search.model.latent_cache`.
        turns: the conversation so far, in the format of chat templates.
    """

    loaded: LoadedModel
    tokens: int = 256
    temperature: float = 0.0
    latent: bool = False
    turns: list[dict[str, str]] = field(default_factory=list)

    @torch.inference_mode()
    def answer(self, prompt: str, say: Callable[[str], None]) -> str:
        """Answer a prompt, given the earlier turns; `say` is called with each piece of the answer as it is generated.

        An answer ends at the last position of the model at the latest. A model without a chat template continues the
        prompt, and does not remember it for the next one.

        Raises:
            Refusal: the prompt is no text, the conversation fills all positions of the model, a token has no embedding,
                or the chat template refuses the conversation.
        """
        if not is_text(prompt):
            raise Refusal("prompt must be text without bytes of another encoding")
        tokenizer, model = self.loaded.tokenizer, self.loaded.model
        if tokenizer.chat_template:
            self.turns.append({"role": "user", "content": prompt})
            encoded: Mapping[str, torch.Tensor] = apply_template(
                tokenizer, self.turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            encoded = tokenizer(prompt, return_tensors="pt")
        ids = encoded["input_ids"].to(model.device)
        length, most = len(self.loaded.known(ids.flatten().tolist())), self.loaded.positions
        if most is not None and length >= most:
            raise Refusal(
                f"the conversation must be shorter than the model's {most} positions, but has {length} tokens"
            )
        tokens = self.tokens if most is None else min(self.tokens, most - length)
        spoken = Spoken(tokenizer.decode, say)
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.temperature}
        with latent_cache(model) if self.latent else nullcontext() as cache:
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                streamer=spoken,
                past_key_values=cache,
                **sampling,
            )
        if tokenizer.chat_template:
            self.turns.append({"role": "assistant", "content": spoken.text})
        return spoken.text


class Spoken:
    """A streamer for transformers' `generate` that decodes tokens and passes on the new text.

    A last character that is incomplete is held back until the next tokens complete it.
    """

    def __init__(self, decode: Callable[..., str], say: Callable[[str], None]) -> None:
        self._decode, self._say = decode, say
        self._tokens: list[int] = []
        self._prompted = False
        self.text = ""

    def put(self, tokens: torch.Tensor) -> None:
        """Receive new tokens of the sequence; the first call gives the prompt, which is ignored."""
        if not self._prompted:
            self._prompted = True
            return
        self._tokens += tokens.flatten().tolist()
        self._tell(self._text().rstrip("\N{REPLACEMENT CHARACTER}"))

    def end(self) -> None:
        """Pass on the remaining text; called after the last token."""
        self._tell(self._text())

    def _text(self) -> str:
        return self._decode(self._tokens, skip_special_tokens=True)

    def _tell(self, text: str) -> None:
        if len(text) > len(self.text):
            self._say(text[len(self.text) :])
            self.text = text
