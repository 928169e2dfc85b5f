"""The student as a model of lm-eval (EleutherAI's lm-evaluation-harness); imports it."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from sdft.evaluation import Response
from sdft.rollout import Sampling
from sdft.seeding import derive_seed, run_seed
from sdft.suites.completions import Order
from sdft.suites.desk import Desk
from sdft.suites.likelihood import Pair

log = logging.getLogger(__name__)

Doc = tuple[str, int]
"""An example of lm-eval: its task's name and its number there."""

MAX_GEN_TOKS = 256
"""Longest completion for a task that sets none, as in lm-eval."""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = (*_LENGTHS, "until", "do_sample", "temperature", "top_p", "top_k")
_UNLIKELY = -1e9


class StudentLM(LM):  # type: ignore[misc]
    """Answers lm-eval's requests with the student as it is, in memory.

    A request that does not fit into the model's context is not cut: it counts as unlikely or
    empty, and its example is in `unfit`, to be left out.

    Args:
        desk: Where work is handed in.
        max_new_tokens: Longest completion; as the task says when None.

    Attributes:
        unfit: Examples that do not fit.
        responses: Completions by example.
    """

    def __init__(self, desk: Desk, max_new_tokens: int | None = None) -> None:
        super().__init__()
        self.desk, self.module = desk, desk.module
        self.max_new_tokens = max_new_tokens
        self.unfit: set[Doc] = set()
        self.responses: dict[Doc, list[Response]] = defaultdict(list)

    # ---------------------------------------------------------------- what lm-eval asks

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding gives it."""
        pairs = [self.pair(*request.args[:2]) for request in requests]
        return self._likelihoods(pairs, [_doc(request) for request in requests])

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Log-probability of each text as a whole, in windows as long as the context."""
        windows: list[Pair] = []
        owners: list[int] = []
        for place, request in enumerate(requests):
            found = self._windows(self.encode(request.args[0]))
            windows += found
            owners += [place] * len(found)
        totals = [0.0] * len(requests)
        for place, one in zip(owners, self.desk.likelihoods(windows), strict=True):
            totals[place] += one.log_prob
        return totals

    def generate_until(self, requests: list[Any]) -> list[str]:
        """A completion of each prompt, up to where a text ends it."""
        texts = [""] * len(requests)
        alike: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True, default=str)].append(place)
        for places in alike.values():
            some = [requests[place] for place in places]
            for place, text in zip(places, self._completed(some), strict=True):
                texts[place] = text
        return texts

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the student's chat template writes it."""
        return str(
            self.module.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **(self.module.template_kwargs[0] or {}),
            )
        )

    @property
    def tokenizer_name(self) -> str:
        """Names the chat template; lm-eval asks for it."""
        return str(getattr(self.module, "model_name", "student"))

    # ---------------------------------------------------------------- tokens

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Token ids; a start that is written in the text is not written again."""
        tokenizer = self.module.tokenizer
        start = tokenizer.bos_token
        if special is None and start and text.startswith(start):
            special = False
        kwargs = {} if special is None else {"add_special_tokens": special}
        return list(tokenizer.encode(text, **kwargs))

    def pair(self, context: str, continuation: str) -> Pair:
        """A context and its continuation, cut where lm-eval cuts: spaces go to the continuation.

        Raises:
            ValueError: There is no token to score.
        """
        if not context:
            ids = self.encode(continuation, special=False)
            if ids[:1] != [self.prefix] or len(ids) == 1:
                return self._checked([self.prefix], ids, continuation)
            return self._checked(ids[:1], ids[1:], continuation)
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = self.encode(context) or [self.prefix]
        whole = self.encode(context + continuation)
        if len(whole) <= len(before):  # the continuation has merged into the context's last token
            pairs = zip(before, whole, strict=False)
            common = next((i for i, (a, b) in enumerate(pairs) if a != b), len(whole))
            before = whole[:common] or [self.prefix]
            return self._checked(before, whole[common:], continuation)
        return self._checked(before, whole[len(before) :], continuation)

    def _checked(self, before: Sequence[int], behind: Sequence[int], text: str) -> Pair:
        if not behind:
            raise ValueError(f"the continuation {text!r} has no token to score")
        return Pair(tuple(before), tuple(behind))

    @property
    def prefix(self) -> int:
        """The token that stands before a text without a context."""
        tokenizer = self.module.tokenizer
        start = tokenizer.bos_token_id
        return int(tokenizer.eos_token_id if start is None else start)

    @property
    def unanswered(self) -> frozenset[Doc]:
        """Examples with a completion whose thoughts have no end."""
        found = self.responses.items()
        return frozenset(doc for doc, own in found if any(one.unanswered for one in own))

    @property
    def room(self) -> int | None:
        """Tokens of the model's context; None when unlimited."""
        config = self.module.model.config.get_text_config()
        room = getattr(config, "max_position_embeddings", None)
        return None if room is None else int(room)

    # ---------------------------------------------------------------- work

    def _likelihoods(self, pairs: Sequence[Pair], docs: Sequence[Doc]) -> list[tuple[float, bool]]:
        room = self.room
        fits = [room is None or len(p.context) + len(p.continuation) - 1 <= room for p in pairs]
        self.unfit |= {doc for doc, fit in zip(docs, fits, strict=True) if not fit}
        found = iter(self.desk.likelihoods([p for p, fit in zip(pairs, fits, strict=True) if fit]))
        return [(*next(found),) if fit else (_UNLIKELY, False) for fit in fits]

    def _windows(self, ids: list[int]) -> list[Pair]:
        longest = self.room or len(ids) + 1
        windows = get_rolling_token_windows(
            token_list=ids, prefix_token=self.prefix, max_seq_len=longest, context_len=1
        )
        return [Pair(*map(tuple, make_disjoint_window(window))) for window in windows]

    def _completed(self, requests: Sequence[Any]) -> list[str]:
        """Completions of requests with the same settings."""
        order = self._order(requests[0].args[1])
        prompts = [self.encode(request.args[0]) or [self.prefix] for request in requests]
        room, longest = self.room, order.sampling.max_new_tokens
        fits = [room is None or len(prompt) + longest <= room for prompt in prompts]
        asked = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
        found = iter(self.desk.complete(asked, order))
        texts = []
        for request, fit in zip(requests, fits, strict=True):
            if fit:
                response = next(found)
                self.responses[_doc(request)].append(response)
            else:
                self.unfit.add(_doc(request))
            texts.append(response.text if fit else "")
        return texts

    def _order(self, settings: Mapping[str, Any]) -> Order:
        unknown = sorted(set(settings) - set(_KNOWN))
        if unknown:
            raise ValueError(
                f"the task generates with {', '.join(map(repr, unknown))}, which rollout engines "
                f"do not know; they know {', '.join(_KNOWN)}"
            )
        given = (settings[key] for key in _LENGTHS if settings.get(key) is not None)
        longest = self.max_new_tokens or int(next(given, MAX_GEN_TOKS))
        temperature = float(settings.get("temperature") or 0.0)
        if settings.get("do_sample") is None:
            drawn = temperature > 0
        else:
            drawn = bool(settings["do_sample"])
            temperature = temperature or 1.0
        until = settings.get("until") or []
        sampling = Sampling(
            longest,
            temperature if drawn else 0.0,
            float(settings.get("top_p") or 1.0) if drawn else 1.0,
            int(settings.get("top_k") or 0) if drawn else 0,
        )
        texts = (until,) if isinstance(until, str) else tuple(until)
        return Order(sampling, texts, derive_seed(run_seed(), "lm-eval"))


def _doc(request: Any) -> Doc:
    return str(request.task_name), int(request.doc_id)
