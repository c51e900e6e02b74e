"""vLLM as a Backend, in this process or with its engine core in one of its own.

Prompts go in as token ids and tokens come out; texts, ends and stop strings are told here, by the same code as in our engine,
so that all backends mean the same by them. Sources: vllm/v1/engine/llm_engine.py, vllm/sampling_params.py,
vllm/v1/metrics/stats.py (RequestSpecDecodeMetrics: accepted and proposed tokens of each round).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

from forerun.backends import vllm_process
from forerun.backends.vllm_args import ROUNDS, drafts, engine_arguments, here
from forerun.backends.vllm_files import find_draft, longest, target_folder
from forerun.backends.vllm_rounds import Counters, StepStats, match
from forerun.backends.vllm_score import Scoring
from forerun.backends.words import Words
from forerun.config import Variant
from forerun.plugin.repair import repaired
from forerun.text import Detokenizer, cut
from forerun.types import Delta, Finish, Request, Sampling, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EAGER_DRAWS = 1e-5
"""Temperatures below this are greedy to vLLM."""


@dataclass
class Job:
    """One completion: what was asked, how far it is, and what of it waits to be told until vLLM has said what was drafted."""

    request: Request
    index: int
    text: Detokenizer
    key: str = ""  # vLLM's name of it
    count: int = 0
    finish: Finish | None = None
    held: list[Delta] = field(default_factory=list)
    told: int = 0  # rounds that went out
    begun: bool = False  # its first token, which prefill yields, went out

    def push(self, tokens: Sequence[int], ends: frozenset[int], now: float) -> None:
        kept, self.finish = cut(tokens, self.request.sampling.max_new - self.count, ends, self.text)
        self.count += len(kept)
        text = self.text.take(last=self.finish is not None)
        self.held.append(Delta(self.request.id, self.index, kept, text, self.finish, None, now))


class Vllm:
    """A Backend around one vLLM engine.

    In this process, rounds are told as they happen. An engine core in a process of its own tells them when a request has ended:
    with drafts, its deltas come then, each with the time at which it was made; of a request that a stop string ended it tells
    none. `facts` has the counters of all rounds so far, those too.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase | None,
        eos: frozenset[int] = frozenset(),
        *,
        multiprocess: bool = False,
        vocabulary: int | None = None,
    ) -> None:
        """Start an engine with EngineArgs; UserError with what vLLM says where it refuses them."""
        self.tokenizer, self.eos, self.vocabulary, self.multiprocess = tokenizer, eos, vocabulary, multiprocess
        self.vllm = vllm_process.load(multiprocess)
        self.arguments = here(arguments)
        self.jobs: dict[str, Job] = {}
        self.cancelled: list[Delta] = []
        self.pooled: list[StepStats] = []  # what vLLM counts for all requests together, where it does not tell every round
        with vllm_process.hushed() as log:
            try:
                self.engine = self._start()
            except Exception as error:  # pydantic, torch, the loaders of checkpoints: no common base class
                if out_of_memory(error):
                    raise
                raise UserError(f"vLLM refuses this: {vllm_process.cause(error, log)}") from error
        config = self.engine.vllm_config
        self.k = int(config.speculative_config.num_speculative_tokens) if config.speculative_config is not None else 0
        self.tells = not self.k or self.arguments.get(ROUNDS) == "detailed"
        self.counters = Counters.none(self.k)
        self.capacity = int(config.model_config.max_model_len)
        self.min_p = float(((arguments.get("additional_config") or {}).get("forerun") or {}).get("min_p") or 0.0)
        self.elsewhere = multiprocess or config.parallel_config.world_size > 1  # processes of their own take no functions
        hidden = self.elsewhere or config.device_config.device_type == "cpu"  # whose build packs weights where no one sees them
        self.weight_bytes = None if hidden else int(sum(self.engine.apply_model(weigh)))

    def _start(self) -> Any:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        known = getattr(EngineArgs, "__dataclass_fields__", {})
        if ROUNDS not in known:
            self.arguments.pop(ROUNDS, None)
        pooled = drafts(self.arguments) and (self.multiprocess or self.arguments.get(ROUNDS) != "detailed")
        if pooled:
            self.arguments["disable_log_stats"] = False
        strange = [name for name in self.arguments if name not in known]
        if strange:
            raise UserError(f"vllm.options.{strange[0]}: this vLLM ({self.vllm.__version__}) has no such engine argument")
        loggers = [StepStats.maker(self.pooled)] if pooled else None
        engine = LLMEngine.from_engine_args(EngineArgs(**self.arguments), stat_loggers=loggers)
        # An engine in this process that is collected would take the process groups of all others with it.
        finalizer = None if self.multiprocess else getattr(engine.engine_core, "_finalizer", None)
        if finalizer is not None:
            finalizer.detach()
        return engine

    @property
    def busy(self) -> bool:
        return bool(self.jobs or self.cancelled)

    @property
    def phases(self) -> None:
        return None

    @property
    def scorer(self) -> Scoring:
        return Scoring(self.engine, self.capacity, lambda: self.busy)

    @property
    def facts(self) -> dict[str, Any]:
        config = self.engine.vllm_config
        drafting = config.speculative_config
        counters = reduce(Counters.joined, (one.sums for one in self.pooled), self.counters)
        return {
            "rule": rule_name(self.arguments),
            "lossless": None,
            "drafter": f"{drafting.method}, a chain of {self.k}" if drafting is not None else None,
            "policy": "constant" if drafting is not None else None,
            "rows": config.scheduler_config.max_num_seqs,
            "capacity": self.capacity,
            "tree_size": 0,  # vLLM drafts less where a row is nearly full
            "compile": not config.model_config.enforce_eager,
            "weight_bytes": self.weight_bytes,
            "kv_bytes": config.cache_config.kv_cache_memory_bytes,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "device": str(config.device_config.device_type),
            "vllm": f"{vllm_process.distribution(vllm_process.installed())} {self.vllm.__version__}",
            "multiprocess": self.multiprocess,
            "quantization": config.model_config.quantization,
            "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
            "preloaded": os.environ.get("LD_PRELOAD") or None,  # vLLM's CPU build is faster with tcmalloc and libiomp5 there
            "repaired": self._repaired(),
            "counters": counters.to_json() if self.k and (self.tells or self.pooled) else None,
        }

    def _repaired(self) -> str | None:
        """What forerun's plugin replaced in vLLM, whose log of it is silent; None: nothing."""
        if not self.k or self.elsewhere:
            return "unknown: vLLM drafts in another process" if self.k else None
        from vllm.v1.sample import rejection_sampler

        return repaired(rejection_sampler)

    def submit(self, request: Request) -> None:
        if not request.prompt:
            raise UserError(f"request {request.id}: the prompt is empty; give at least one token")
        needed = len(request.prompt) + request.sampling.max_new
        if needed > self.capacity:
            raise UserError(
                f"request {request.id}: {len(request.prompt)} prompt + {request.sampling.max_new} new tokens are {needed}, "
                f"more than vLLM's max_model_len of {self.capacity}; shorten either, or raise engine.capacity"
            )
        outside = [token for token in request.prompt if self.vocabulary is not None and not 0 <= token < self.vocabulary]
        if outside:
            raise UserError(f"request {request.id}: token {outside[0]} is not in the vocabulary of {self.vocabulary}")
        if any(job.request.id == request.id for job in self.jobs.values()):
            raise UserError(f"request {request.id}: a request of this id is in flight; ids must be unique")
        for index in range(request.sampling.n):
            name = json.dumps([request.id, index])
            job = Job(request, index, Detokenizer(self.tokenizer, request.sampling.stop))
            try:
                # Not vLLM's own `n`: its completions would share one name.
                key = self.engine.add_request(name, {"prompt_token_ids": list(request.prompt)}, self._params(request, index))
            except UserError:
                raise
            except Exception as error:  # vLLM has several base classes of its own
                raise UserError(f"request {request.id}: vLLM refuses it: {vllm_process.cause(error)}") from error
            job.key = str(key or name)
            self.jobs[name] = job

    def _ends(self, sampling: Sampling) -> frozenset[int]:
        return frozenset(sampling.stop_ids) | (frozenset() if sampling.ignore_eos else self.eos)

    def _params(self, request: Request, index: int) -> Any:
        """Ends go in as stop ids, so that vLLM adds none of its own."""
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        if self.k and sampling.min_p not in (0.0, self.min_p):
            raise UserError(f"request {request.id}: min_p={sampling.min_p}; with drafts vLLM has one for all: {self.min_p}")
        return self.vllm.SamplingParams(
            temperature=sampling.temperature if sampling.temperature >= EAGER_DRAWS else 0.0,
            top_k=sampling.top_k, top_p=sampling.top_p, min_p=0.0 if self.k else sampling.min_p,
            repetition_penalty=sampling.repetition_penalty, presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty, logit_bias=dict(sampling.logit_bias) or None,
            max_tokens=sampling.max_new, stop_token_ids=sorted(self._ends(sampling)), ignore_eos=True,
            seed=None if sampling.seed is None else sampling.seed + index,
            detokenize=False, output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip

    def cancel(self, id: str) -> None:
        for name, job in [(name, job) for name, job in self.jobs.items() if job.request.id == id]:
            self.engine.abort_request([name])
            self.cancelled += [*job.held, Delta(id, job.index, (), "", "cancelled")]
            del self.jobs[name]

    def step(self) -> list[Delta]:
        """One step of vLLM's scheduler. Without drafts every delta goes out at once."""
        deltas, self.cancelled = self.cancelled, []
        if not self.jobs:
            return deltas
        try:
            outputs = self.engine.step()
        except Exception as error:  # a kernel, a plugin, a process of vLLM's that died: no common base class
            if out_of_memory(error):
                raise
            raise UserError(f"vLLM failed with {len(self.jobs)} in flight: {vllm_process.cause(error)}") from error
        now = time.perf_counter()
        for output in outputs:
            job = self.jobs.get(output.request_id)
            if job is None:
                continue
            [part] = output.outputs
            job.push(part.token_ids, self._ends(job.request.sampling), now)
            told = getattr(part, "spec_decode_metrics", None) or self._live(job)
            if job.finish is None and part.finish_reason is not None:
                if part.finish_reason != "length":
                    raise RuntimeError(f"vLLM ended request {job.request.id!r} with {part.finish_reason!r}")
                job.finish = "length"
                last = job.held[-1]
                job.held[-1] = replace(last, text=last.text + job.text.take(last=True), finish=job.finish)
            if job.finish is not None and part.finish_reason is None:
                self.engine.abort_request([output.request_id])  # a stop string, which vLLM does not know of
            deltas += self._release(job, told)
            if job.finish is not None:
                del self.jobs[output.request_id]
        return deltas

    def _live(self, job: Job) -> Any:
        """What the scheduler has noted of a running request; None where it is in another process."""
        core = getattr(getattr(self.engine.engine_core, "engine_core", None), "scheduler", None)
        request = core.requests.get(job.key) if core is not None else None
        return getattr(request, "spec_decode_metrics", None)

    def _release(self, job: Job, told: Any) -> list[Delta]:
        """The deltas whose rounds are known by now; at the end of a request all of them."""
        if self.k and self.tells and told is None and job.finish is None:
            return []
        out, job.held = job.held, []
        rounds = list(zip(told.per_step_drafted, told.per_step_accepted, strict=True)) if told is not None else None
        fresh = None if rounds is None and self.k else (rounds or [])[job.told :]
        out = match(out, fresh, first=not job.begun)
        job.begun = True
        if fresh:
            job.told += len(fresh)
            if not self.pooled:
                self.counters = self.counters.plus(fresh)
        return out


def weigh(model: Any) -> int:
    """Bytes of a module's weights, those that layers share counted once."""
    return sum({one.data_ptr(): one.nbytes for one in (*model.parameters(), *model.buffers())}.values())


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error) or type(error).__name__ == "OutOfMemoryError"


def rule_name(arguments: Mapping[str, Any]) -> str:
    """`vLLM, typical`, or vLLM's own rule by its name there."""
    drafts = arguments.get("speculative_config")
    if not drafts:
        return "vLLM, nothing drafted"
    own = f"its own ({drafts.get('rejection_sample_method', 'standard')})"
    said = (arguments.get("additional_config") or {}).get("forerun") or {}
    rule = dict(said.get("rule") or {})
    kind = rule.pop("kind", "auto" if said else None)  # a min-p alone has forerun judge too
    options = ", ".join(f"{name}={value}" for name, value in rule.items())
    return "vLLM, " + (own if kind is None else f"{kind}({options})" if options else str(kind))


def build(variant: Variant, words: Words, say: Callable[[str], None]) -> Vllm:
    """The engine of a variant; UserError where its parts do not fit, or vLLM refuses it."""
    config = variant.vllm
    if config.data_parallel_size > 1:
        raise UserError(
            f"vllm.data_parallel_size={config.data_parallel_size}: only a server has several engines; start the line that "
            "`forerun vllm-args` prints and measure it with backend=endpoint"
        )
    vllm_process.distribution(vllm_process.installed())  # before a model is compressed for it
    target = target_folder(variant.model, "target", say)
    arguments = engine_arguments(variant, target, find_draft(variant, say), longest(variant))
    module = vllm_process.load(config.multiprocess)
    with vllm_process.hushed():
        from vllm.platforms import current_platform
    device = str(current_platform.device_type)
    if variant.model.device not in ("auto", device):
        raise UserError(f"model.device={variant.model.device}: this vLLM ({module.__version__}) runs on {device}")
    workers = config.tensor_parallel_size * config.pipeline_parallel_size
    ours = "forerun" in (arguments.get("additional_config") or {})
    stretched = device == "cpu" and variant.sampling.temperature > 0  # by the function that the plugin repairs
    if (config.multiprocess or workers > 1) and drafts(arguments) and (ours or stretched):
        reach_what = f"rule.kind={variant.rule.kind}" if ours else "sampling with drafts on vLLM's CPU build"
        vllm_process.reach_workers(reach_what)
    if device == "cpu":
        vllm_process.bind_cores(workers)
    return Vllm(arguments, words.tokenizer, words.ends, multiprocess=config.multiprocess, vocabulary=words.vocabulary)
