"""transformers' own `generate`, plain and assisted, as a Backend: what our engine is compared with on the same weights."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from forerun.config import NGramConfig
from forerun.scoring import ModelScorer
from forerun.text import Detokenizer, cut
from forerun.types import Delta, Finish, Phases, Request, Round, Sampling, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Job:
    """One completion: what it asked for, and how far it is."""

    request: Request
    index: int
    text: Detokenizer
    ends: frozenset[int]
    count: int = 0
    finish: Finish | None = None

    def push(self, tokens: Sequence[int], round: Round | None) -> Delta:
        """Take tokens in, cut at the first end."""
        kept, self.finish = cut(tokens, self.request.sampling.max_new - self.count, self.ends, self.text)
        self.count += len(kept)
        text = self.text.take(last=self.finish is not None)
        return Delta(self.request.id, self.index, kept, text, self.finish, round, time.perf_counter())


class Reference:
    """A Backend around `generate`: one request at a time, or, where nothing drafts, static batches of up to `rows`.

    A batch is what transformers offers: prompts of requests that sample alike, padded on the left, and no new request until
    the slowest row is done. A step is one call of `generate`, in the caller's own thread, for a second thread would bring a
    second team of OpenMP workers, which slows every other variant; each delta says when it was made. Assisted rounds are
    told too: the drafted tokens are counted where the target's forward pass receives them; the first round is part of
    the prefill, as transformers does it. In the last round drafts that transformers cut off count as not accepted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        assistant: PreTrainedModel | None = None,
        *,
        k: int = 0,
        lookup: NGramConfig | None = None,
        confidence: float = 0.0,
        rows: int = 1,
        eos: frozenset[int] = frozenset(),
    ) -> None:
        self.model, self.tokenizer, self.eos = model, tokenizer, eos
        self.assistant = with_settings(assistant, k, confidence) if assistant is not None and k else None
        self.k, self.lookup = k, lookup if k else None
        self.assisted = self.assistant is not None or self.lookup is not None
        self.rows = 1 if self.assisted else rows
        self.waiting: deque[Job] = deque()
        self.cancelled: list[Delta] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.cancelled)

    @property
    def phases(self) -> Phases | None:
        return None

    @property
    def scorer(self) -> ModelScorer:
        return ModelScorer(self.model)

    @property
    def facts(self) -> dict[str, Any]:
        weights = {p.data_ptr(): p.nbytes for p in self.model.parameters()}
        kind = "assistant" if self.assistant is not None else "prompt lookup" if self.lookup else "plain"
        return {
            "rule": f"transformers generate, {kind}",
            "lossless": True,
            "drafter": kind,
            "policy": "constant" if self.assisted else None,
            "rows": self.rows,
            "batching": "static, left-padded" if self.rows > 1 else "one request at a time",
            "weight_bytes": sum(weights.values()),
            "kv_bytes": None,
            "compile": False,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
        }

    def submit(self, request: Request) -> None:
        sampling = request.sampling
        if not request.prompt:
            raise UserError(f"request {request.id}: the prompt is empty; give at least one token")
        if (sampling.presence_penalty, sampling.frequency_penalty) != (0.0, 0.0):
            raise UserError("backend=reference: transformers has no presence or frequency penalty; leave both at 0")
        ends = frozenset(sampling.stop_ids) | (frozenset() if sampling.ignore_eos else self.eos)
        for index in range(sampling.n):
            self.waiting.append(Job(request, index, Detokenizer(self.tokenizer, sampling.stop), ends))

    def cancel(self, id: str) -> None:
        ended = [job for job in self.waiting if job.request.id == id]
        self.cancelled += [Delta(id, job.index, (), "", "cancelled") for job in ended]
        self.waiting = deque(job for job in self.waiting if job.request.id != id)

    def step(self) -> list[Delta]:
        """The completions of one call of `generate`, token by token."""
        deltas, self.cancelled = self.cancelled, []
        if not self.waiting:
            return deltas
        jobs = self._gather()
        deltas += self._run(jobs)
        broken = [job for job in jobs if job.finish is None]
        if broken:
            raise RuntimeError(f"transformers ended {broken[0].request.id} before its end")
        return deltas

    def _gather(self) -> list[Job]:
        """The next jobs that can share a batch: those right behind the first that sample alike."""
        found = [self.waiting.popleft()]
        alone = found[0].request.sampling.repetition_penalty != 1.0  # it would count the padding as text
        while self.waiting and len(found) < self.rows and not alone and alike(found[0], self.waiting[0]):
            found.append(self.waiting.popleft())
        return found

    def _run(self, jobs: list[Job]) -> list[Delta]:
        device, sampling = self.model.device, jobs[0].request.sampling
        longest = max(len(job.request.prompt) for job in jobs)
        pads = [longest - len(job.request.prompt) for job in jobs]
        padded = [[0] * pad + list(job.request.prompt) for pad, job in zip(pads, jobs, strict=True)]
        ids_BT = torch.tensor(padded, device=device)
        mask_BT = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=device)
        relay = Relay(self.model, jobs, longest if self.assisted else None)
        extra = {"assistant_model": self.assistant} if self.assistant is not None else {}
        hook = self.model.register_forward_pre_hook(relay.count_drafted, with_kwargs=True) if self.assisted else None
        cuda = [device] if device.type == "cuda" else []
        try:
            with torch.random.fork_rng(cuda), torch.inference_mode():
                if sampling.seed is not None:
                    torch.manual_seed(sampling.seed + jobs[0].index)
                self.model.generate(  # type: ignore[operator]
                    ids_BT, attention_mask=mask_BT, generation_config=self._settings(jobs),
                    streamer=relay, stopping_criteria=[relay.finished], **extra,
                )  # fmt: skip
        finally:
            if hook is not None:
                hook.remove()
        return relay.deltas

    def _settings(self, jobs: list[Job]) -> GenerationConfig:
        """Everything is said explicitly: what is left out, transformers takes from the checkpoint's own generation config."""
        sampling = jobs[0].request.sampling
        config = GenerationConfig(
            max_new_tokens=max(job.request.sampling.max_new for job in jobs),
            do_sample=not sampling.greedy,
            temperature=1.0 if sampling.greedy else sampling.temperature,
            top_p=1.0 if sampling.greedy else sampling.top_p,
            top_k=50 if sampling.greedy else sampling.top_k,  # 50 is the default, which greedy decoding ignores quietly
            repetition_penalty=sampling.repetition_penalty,
            no_repeat_ngram_size=0,
            num_beams=1,
            eos_token_id=sorted(jobs[0].ends),  # an empty list, since None would bring the checkpoint's own back
            # Assisted decoding masks this token wherever it stands in a prompt: it must be none that can stand there.
            pad_token_id=self.model.get_output_embeddings().out_features if self.assisted else 0,
            use_cache=True,
        )
        if not sampling.greedy and (sampling.min_p or self.model.generation_config.min_p):
            config.min_p = sampling.min_p
        if sampling.logit_bias:
            config.sequence_bias = [[[token], float(bias)] for token, bias in sampling.logit_bias.items()]
        if self.lookup is not None:
            config.prompt_lookup_num_tokens = self.k
            config.max_matching_ngram_size = self.lookup.lookup_max
        return config


class Relay:
    """What `generate` talks to: a streamer that turns its tokens into deltas, and the criterion that ends its rows."""

    def __init__(self, target: PreTrainedModel, jobs: list[Job], assisted_prompt: int | None) -> None:
        self.target, self.jobs = target, jobs
        self.deltas: list[Delta] = []
        self.assisted = assisted_prompt is not None
        self.known = assisted_prompt or 0  # positions of the next pass that are not drafts
        self.drafted = 0
        self.begun = False

    def count_drafted(self, module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        """Before a pass of the target: positions beyond the prompt (first pass) or the pending token are drafts."""
        if module is not self.target:  # an assistant that is the target itself shares its hooks
            return
        self.drafted = kwargs["input_ids"].shape[1] - self.known
        self.known = 1

    def put(self, value: Tensor) -> None:
        """New tokens: [B] from plain decoding, [1, T] from a round of assisted decoding; the prompt comes first."""
        if not self.begun:
            self.begun = True
            return
        for job, tokens in zip(self.jobs, value.reshape(len(self.jobs), -1).tolist(), strict=True):
            if job.finish is None:
                round = Round(self.drafted, len(tokens) - 1, self.drafted + 1) if self.assisted else None
                self.deltas.append(job.push(tokens, round))

    def end(self) -> None:
        """Part of a streamer; the end of `generate` itself is what counts."""

    def finished(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        """[B] bool: rows that are done."""
        return torch.tensor([job.finish is not None for job in self.jobs], device=input_ids.device)


def alike(one: Job, other: Job) -> bool:
    """Whether two jobs differ in nothing that `generate` takes once for a batch."""
    own: dict[str, Any] = {"max_new": 1, "stop": (), "seed": None, "n": 1}

    def rest(sampling: Sampling) -> Sampling:
        return replace(sampling, **own)

    return rest(one.request.sampling) == rest(other.request.sampling) and one.ends == other.ends


def with_settings(assistant: PreTrainedModel, k: int, confidence: float) -> PreTrainedModel:
    """The same module with draft settings of its own, since transformers reads them from the assistant's generation config."""
    twin = copy.copy(assistant)
    twin.generation_config = copy.deepcopy(assistant.generation_config)
    twin.generation_config.num_assistant_tokens = k
    twin.generation_config.num_assistant_tokens_schedule = "constant"
    twin.generation_config.assistant_confidence_threshold = confidence
    return twin
