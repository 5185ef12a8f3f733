"""Present a loaded model to lm-eval as a language model.

Requests are answered with our own forward passes, so a model that is compressed in memory can be measured without
being written to a folder first. A non-finite logit raises `NonFinite` instead of giving an answer. Only this module and
`search.benchmarking.lm_eval_tasks` import lm-eval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from compression.refusal import Refusal
from search.benchmarking.generation import NonFinite, generate
from search.benchmarking.likelihood import continuations, text_likelihoods
from search.model.loading import LoadedModel

__all__ = ["LanguageModel"]

_GENERATED = 256  # most generated tokens unless the task sets a limit; the default of lm-eval
_CPU_BATCH, _GPU_BATCH = 1024, 16384  # tokens in one forward pass


class LanguageModel(LM):  # type: ignore[misc]  # lm-eval publishes no types
    """A loaded model behind lm-eval's `LM` interface.

    Args:
        loaded: the model and its tokenizer. Texts are tokenized as in lm-eval, with the special tokens that the
            tokenizer puts before a text and without a chat template.
        progress: called with the number of requests answered since the last call.
    """

    def __init__(self, loaded: LoadedModel, progress: Callable[[int], None] = lambda done: None) -> None:
        super().__init__()
        self._loaded = loaded
        self.progress = progress
        tokenizer = loaded.tokenizer
        config = loaded.model.config
        named = (getattr(config, name, None) for name in ("n_positions", "max_position_embeddings", "n_ctx"))
        self._limit = next((int(length) for length in named if length), 2048)
        self._begin: int = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        own = getattr(getattr(loaded.model, "generation_config", None), "eos_token_id", None)
        self._ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        self._batch = _CPU_BATCH if loaded.model.device.type == "cpu" else _GPU_BATCH

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, nats, and whether greedy decoding would give it."""
        pairs = [request.args for request in requests]
        model, encode = self._loaded.model, self._loaded.encode_whole
        found = continuations(model, encode, pairs, self._limit, self._begin, self._batch, self.progress)
        _check([one.loglikelihood for one in found])
        return [(one.loglikelihood, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probability of whole texts, nats."""
        texts = [text for (text,) in (request.args for request in requests)]
        model, encode = self._loaded.model, self._loaded.encode_whole
        found = text_likelihoods(model, encode, texts, self._limit, self._begin, self._batch, self.progress)
        _check(found)
        return found

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The greedy continuation of each prompt, up to but not including its first stop string.

        Raises:
            ValueError: a request asks for sampling.
        """
        by_settings: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for number, (_, settings) in enumerate(request.args for request in requests):
            if settings.get("do_sample") or settings.get("temperature"):
                raise Refusal(f"only greedy generation is measured, but a request asks for {settings}")
            until = settings.get("until") or []
            stops = (until,) if isinstance(until, str) else tuple(until)
            by_settings.setdefault((stops, int(settings.get("max_gen_toks", _GENERATED))), []).append(number)
        texts = [""] * len(requests)
        for (stops, most), numbers in by_settings.items():
            room = max(1, self._limit - most)
            prompts = [self._loaded.encode_whole(requests[number].args[0])[-room:] for number in numbers]
            ended = partial(self._ended, stops=stops)
            written = generate(self._loaded.model, prompts, most, ended, self.progress)
            for number, tokens in zip(numbers, written, strict=True):
                texts[number] = self._text(tokens, stops)
        return texts

    def _ended(self, written: list[int], stops: Sequence[str]) -> bool:
        if written[-1] in self._ends:
            return True
        text = self._loaded.tokenizer.decode(written)
        return any(stop in text for stop in stops)

    def _text(self, written: list[int], stops: Sequence[str]) -> str:
        tokenizer = self._loaded.tokenizer
        text: str = tokenizer.decode(written, skip_special_tokens=True)
        for stop in (*stops, tokenizer.decode(tokenizer.eos_token_id)):
            text = text.split(stop)[0] if stop else text
        return text


def _check(values: Sequence[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise NonFinite("the model gives NaN or infinite logits")
