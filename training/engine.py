"""The local model: `LocalEngine` answers whatever calls are in flight with shared forward passes.

Many sandboxed Episodes ask at once. One worker thread collects their calls, computes what their prompts share once
(`training.kv_tree`), and decodes all of them together, each row leaving the batch as it ends and later calls joining
it on the way. Calls for different Adapters take turns. Nothing is loaded before the first call, so a resumed run
that finds every answer on record never pays for a model.

    engine = LocalEngine(ensure_base_model(), adapter_path=lambda adapter: folder / adapter)
    engine.submit(ModelRequest(Sampling(max_tokens=8, stop=("\\n",)), seed=1, prompt="Q: 5 - 9 =\\nA:")).result()

What it guarantees: recorded token ids are those sampled, log-probabilities are at temperature 1 over the full
vocabulary, and each draw comes from the call's own random stream. What it does not, unless `deterministic`: bitwise
equality between two batchings. Rounding differs by about 3e-5 in a logit, which can turn a near tie.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from agents.model import Completion, EngineError, ModelRequest, RequestError
from training import sampling
from training.kv_tree import EngineStats, KvTree
from training.loading import ModelFacts, load_model, load_tokenizer, prompt_tokens, read_facts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GATHER_S = 0.004
"""An idle engine starts when no call has come for this long."""
GATHER_MOST_S = 0.1
"""... or when the first one has waited this long."""
MERGED_MODELS = 3
"""Adapters whose merged weights (a whole model each) are kept in memory."""


@dataclass(eq=False)
class _Call:
    """A submitted request and, once it is admitted, the row of the batch that answers it."""

    request: ModelRequest
    future: Future[Completion]
    prompt_ids: tuple[int, ...] = ()
    limit: int = 0
    node: int = -1
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class LocalEngine:
    """An `agents.model.Engine` on this machine's own processor.

    Args:
        model_dir: a model folder (`training.base_model`), or a function that provides one, which is called once, by the
            worker, when the first call has come. What it raises fails the calls at hand with EngineError.
        adapter_path: where the PEFT adapter folder of an Adapter id lies.
        device: a torch device. Weights are fp32.
        deterministic: compute each call alone, in shapes that depend on nothing else: a Completion is then a bitwise
            function of (weights, request) on one machine. Several times slower.
        max_rows: the most calls decoded together.
        threads: CPU threads of the worker's tensor operations; None leaves torch's own choice.
        name: what the model is called; by default as its folder, or `local` while a function has yet to provide it.
    """

    trainable = True

    def __init__(
        self,
        model_dir: Path | Callable[[], Path],
        adapter_path: Callable[[str], Path],
        *,
        device: str = "cpu",
        deterministic: bool = False,
        max_rows: int = 256,
        threads: int | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name or (model_dir.name if isinstance(model_dir, Path) else "local")
        self.stats = EngineStats()
        self._model_dir = model_dir
        self._adapter_path = adapter_path
        self._device = device
        self._deterministic = deterministic
        self._max_rows = max_rows
        self._threads = threads
        self._changed = threading.Condition()
        self._waiting: deque[_Call] = deque()
        self._closed = False
        self._worker: threading.Thread | None = None
        self._loaded: _Loaded | None = None
        self._trees: OrderedDict[str | None, KvTree] = OrderedDict()

    def submit(self, request: ModelRequest) -> Future[Completion]:
        """Ask. Returns at once; the future raises RequestError or EngineError."""
        future: Future[Completion] = Future()
        with self._changed:
            if self._closed:
                future.set_exception(EngineError("the engine is closed"))
                return future
            self._waiting.append(_Call(request, future))
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name=f"engine {self.name}", daemon=True)
                self._worker.start()
            self._changed.notify()
        return future

    def close(self) -> None:
        """Stop the worker after its current pass. Calls that have no answer yet fail with EngineError."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._worker is not None:
            self._worker.join()
        for call in self._waiting:
            _fail(call, "the engine is closed")
        self._waiting.clear()
        self._trees.clear()
        self._loaded = None

    def _work(self) -> None:
        import torch

        if self._threads or self._deterministic:
            # Also switches off that MKL picks its number of threads by itself, which would change roundings.
            torch.set_num_threads(self._threads or torch.get_num_threads())
        while self._gather():
            with self._changed:
                adapter = self._waiting[0].request.adapter
            rows: list[_Call] = []
            try:
                self._turn(adapter, rows)
            except Exception as error:
                self._trees.pop(adapter, None)
                logging.getLogger(__name__).debug("a turn of %s failed", adapter or "the base model", exc_info=True)
                reason = str(error) if isinstance(error, EngineError) else f"the model failed: {error!r}"
                for call in rows:
                    _fail(call, reason)

    def _gather(self) -> bool:
        """Wait until there is something to do and no more seems to be coming. False once the engine is closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            until = time.monotonic() + GATHER_MOST_S
            while not self._closed and len(self._waiting) < self._max_rows and time.monotonic() < until:
                if not self._changed.wait(GATHER_S):
                    break
            return not self._closed

    def _turn(self, adapter: str | None, rows: list[_Call]) -> None:
        """Answer the waiting calls of one Adapter. `rows` holds those in progress, for the caller to fail on error.

        Calls that arrive meanwhile join in, unless another Adapter's calls wait: then the turn ends with its rows.
        """
        rows.extend(self._take(adapter, self._room(rows)))  # claimed first: if loading fails, they are told
        loaded = self._load()
        tree = self._tree(adapter, loaded)
        logits: dict[int, torch.Tensor] = {}
        while rows:
            if self._closed:
                raise EngineError("the engine is closed")
            fresh = [call for call in rows if call.node < 0 and _prepare(call, loaded)]
            rows[:] = [call for call in rows if not call.future.done()]
            if fresh:
                nodes, behind = tree.prefill([call.prompt_ids for call in fresh])
                for call, node in zip(fresh, nodes, strict=True):
                    call.node = node
                logits |= behind
            self._sample(rows, logits, tree, loaded)
            rows[:] = [call for call in rows if not call.future.done()]
            if rows:
                nodes, logits = tree.extend([(call.node, call.ids[-1]) for call in rows])
                for call, node in zip(rows, nodes, strict=True):
                    call.node = node
            if not self._deterministic:
                rows.extend(self._take(adapter, self._room(rows), joining=True))

    def _room(self, rows: Sequence[_Call]) -> int:
        return 1 if self._deterministic else self._max_rows - len(rows)

    def _take(self, adapter: str | None, most: int, joining: bool = False) -> list[_Call]:
        """Claim up to `most` waiting calls of an Adapter, oldest first; none to a turn that others wait for."""
        taken: list[_Call] = []
        with self._changed:
            if joining and any(call.request.adapter != adapter for call in self._waiting):
                return taken
            kept: deque[_Call] = deque()
            for call in self._waiting:
                if call.request.adapter != adapter or len(taken) == most:
                    kept.append(call)
                elif call.future.set_running_or_notify_cancel():
                    taken.append(call)
            self._waiting = kept
        return taken

    def _sample(self, rows: Sequence[_Call], logits: dict[int, torch.Tensor], tree: KvTree, loaded: _Loaded) -> None:
        """Draw the next token of every row and end those that are through."""
        groups: dict[tuple[int, float, float], list[_Call]] = {}
        for call in rows:
            asked = call.request.sampling
            groups.setdefault((call.node, asked.temperature, asked.top_p), []).append(call)
        import torch

        normalised: dict[int, torch.Tensor] = {}
        for (node, _, _), calls in groups.items():
            uniforms = [sampling.uniform(call.request.seed, len(call.ids)) for call in calls]
            tokens = sampling.draw(logits[node], calls[0].request.sampling, uniforms)
            if node not in normalised:
                normalised[node] = torch.logsumexp(logits[node], dim=-1)
            for call, token in zip(calls, tokens, strict=True):
                call.ids.append(token)
                call.logprobs.append(float(logits[node][token] - normalised[node]))
                self.stats.sampled_tokens += 1
                completion = _completion(call, loaded)
                if completion is not None:
                    tree.release(call.node)
                    self.stats.completions += 1
                    call.future.set_result(completion)

    def _load(self) -> _Loaded:
        if self._loaded is None:
            folder = self._model_dir if isinstance(self._model_dir, Path) else self._model_dir()
            self._loaded = _Loaded(
                facts=read_facts(folder),
                tokenizer=load_tokenizer(folder),
                model=load_model(folder, self._device),
            )
        return self._loaded

    def _tree(self, adapter: str | None, loaded: _Loaded) -> KvTree:
        """The tree of an Adapter's model; a new one for every call in deterministic mode."""
        tree = self._trees.get(adapter)
        if tree is None:
            model = loaded.model
            if adapter is not None:
                while len(self._trees) - (None in self._trees) >= MERGED_MODELS:
                    oldest = next(key for key in self._trees if key is not None)
                    del self._trees[oldest]
                model = merge_adapter(loaded.model, self._adapter_path(adapter))
                self.stats.models_merged += 1
            tree = KvTree(model, self.stats)
        elif self._deterministic:
            tree = KvTree(tree.model, self.stats)
        self._trees[adapter] = tree
        self._trees.move_to_end(adapter)
        return tree


@dataclass(frozen=True)
class _Loaded:
    facts: ModelFacts
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel


def merge_adapter(base: PreTrainedModel, adapter_dir: Path) -> PreTrainedModel:
    """A copy of `base` with the adapter's update added to its weights, so that decoding pays nothing for it.

    Always made from the base: merging one adapter into another's sum, or taking one out again, would leave rounding.
    """
    import copy

    from peft import PeftModel

    if not (adapter_dir / "adapter_config.json").is_file():
        raise FileNotFoundError(f"no adapter in {adapter_dir}")
    # Adapters touch linear layers only; the token embedding, a fifth of a small model, is shared by all copies.
    embedding = base.get_input_embeddings().weight
    copied = copy.deepcopy(base, {id(embedding): embedding})
    merged = PeftModel.from_pretrained(copied, adapter_dir).merge_and_unload()
    return merged.eval().requires_grad_(False)


def _fail(call: _Call, reason: str) -> None:
    if not call.future.done():  # one error object a call: a raised exception carries its own traceback
        call.future.set_exception(EngineError(reason))


def _prepare(call: _Call, loaded: _Loaded) -> bool:
    """Tokenise a call and check it. False, with the future failed, if no engine could answer it."""
    try:
        sampling.check(call.request.sampling)
        call.prompt_ids = prompt_tokens(loaded.tokenizer, call.request)
        left = loaded.facts.context - len(call.prompt_ids)
        if left < 1:
            raise RequestError(
                f"the prompt has {len(call.prompt_ids)} tokens, the model's context is {loaded.facts.context}"
            )
        call.limit = min(call.request.sampling.max_tokens, left)
    except RequestError as error:
        call.future.set_exception(error)
        return False
    return True


def _completion(call: _Call, loaded: _Loaded) -> Completion | None:
    """The finished answer if the last token ended it."""
    stop = call.request.sampling.stop
    ended = call.ids[-1] in loaded.facts.end_ids
    text: str | None = None
    if ended or stop or len(call.ids) == call.limit:
        kept = call.ids[:-1] if ended else call.ids
        whole = str(loaded.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        text = sampling.cut(whole, stop)
        if text is None and (ended or len(call.ids) == call.limit):
            text, reason = whole, "stop" if ended else "length"
        else:
            reason = "stop"
    if text is None:
        return None
    return Completion(text, call.prompt_ids, tuple(call.ids), tuple(call.logprobs), reason)
