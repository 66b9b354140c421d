"""The local engine on the real model: answers, records, sharing, isolation, and bitwise repeatability on demand."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from agents.archive import Objective
from agents.decision import TrainSettings
from agents.model import Completion, Engine, EngineError, Message, ModelRequest, RequestError, Sampling
from training.base_model import BaseModelError
from training.engine import LocalEngine
from training.loading import load_model, load_tokenizer
from training.trainer import TrainCall, TrainEpisode, Trainer

QUESTION = "Q: State the final answer to the following arithmetic problem: {} =\nA:"
SHOTS = "".join(
    QUESTION.format(sum_) + f" {answer}\n\n" for sum_, answer in [("5 - 9", -4), ("13 + 8", 21), ("40 - 7", 33)]
)
SUMS = ["7 + 2", "64 - 31", "9 - 12", "88 + 9", "3 + 3", "51 - 50"]
NEWLINE = Sampling(max_tokens=8, stop=("\n",))


def ask(prompt: str, sampling: Sampling = NEWLINE, seed: int = 0, adapter: str | None = None) -> ModelRequest:
    return ModelRequest(sampling=sampling, seed=seed, prompt=prompt, adapter=adapter)


def answers(engine: Engine, requests: Sequence[ModelRequest]) -> list[Completion]:
    futures: list[Future[Completion]] = [engine.submit(request) for request in requests]
    return [future.result(timeout=120) for future in futures]


def test_batched_equals_alone_and_answers_are_sensible(real_engine: LocalEngine, smollm: Path) -> None:
    requests = [ask(SHOTS + QUESTION.format(sum_)) for sum_ in SUMS]
    requests += [
        ModelRequest(Sampling(max_tokens=6), 0, messages=(Message("user", f"What is {sum_}?"),)) for sum_ in SUMS
    ]
    together = answers(real_engine, requests)
    single = LocalEngine(smollm, adapter_path=Path, deterministic=True, threads=2)
    try:
        apart = answers(single, requests)
    finally:
        single.close()
    assert [c.text for c in together] == [c.text for c in apart]
    assert [c.completion_ids for c in together] == [c.completion_ids for c in apart]
    for one, other in zip(together, apart, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert all(c.finish_reason == "stop" and c.text.strip("- ").isdigit() for c in together[: len(SUMS)])


def test_logprobs_are_those_of_a_plain_forward(real_engine: LocalEngine, smollm: Path) -> None:
    sampling = Sampling(temperature=1.3, top_p=0.9, max_tokens=10)
    requests = [ask(SHOTS + QUESTION.format(sum_), sampling, seed) for seed, sum_ in enumerate(SUMS)]
    model = load_model(smollm, "cpu")
    tokenizer = load_tokenizer(smollm)
    for request, completion in zip(requests, answers(real_engine, requests), strict=True):
        assert completion.prompt_ids == tuple(tokenizer(request.prompt).input_ids)
        ids = completion.prompt_ids + completion.completion_ids
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        start = len(completion.prompt_ids) - 1
        expected = [float(logp[start + i, token]) for i, token in enumerate(completion.completion_ids)]
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_prompt_is_computed_once_for_all_samples(tiny_engine: LocalEngine) -> None:
    sampling = Sampling(temperature=1, max_tokens=4)
    prompts = [SHOTS + QUESTION.format(sum_) for sum_ in SUMS]
    requests = [ask(prompt, sampling, seed) for seed, prompt in enumerate(prompts * 8)]
    completions = answers(tiny_engine, requests)
    paths = {c.prompt_ids[:end] for c in completions for end in range(1, len(c.prompt_ids) + 1)}
    assert tiny_engine.stats.prefill_tokens == len(paths)
    assert len(paths) < len(prompts) * len(completions[0].prompt_ids) / 3
    assert tiny_engine.stats.completions == len(requests)
    assert tiny_engine.stats.sampled_tokens == sum(len(c.completion_ids) for c in completions)
    assert tiny_engine.stats.forwards < 30
    assert len({c.completion_ids for c in completions}) > len(requests) // 2


def test_draws_depend_on_the_seed_alone(tiny_engine: LocalEngine) -> None:
    sampling = Sampling(temperature=1, max_tokens=6)
    request = ask("Once upon a time", sampling, seed=5)
    first = answers(tiny_engine, [request])[0]
    crowd = [ask(f"Once upon a time {i}", sampling, seed=i) for i in range(20)]
    again = answers(tiny_engine, [*crowd[:9], request, *crowd[9:]])[9]
    other = answers(tiny_engine, [ask("Once upon a time", sampling, seed=6)])[0]
    assert again.completion_ids == first.completion_ids
    assert other.completion_ids != first.completion_ids


def test_stop_strings_length_and_prefill(real_engine: LocalEngine, smollm: Path) -> None:
    tokenizer = load_tokenizer(smollm)
    prompt = "The alphabet: A B C D E F G"
    plain, stopped, inside, short = answers(
        real_engine,
        [
            ask(prompt, Sampling(max_tokens=6)),
            ask(prompt, Sampling(max_tokens=6, stop=("K",))),
            ask(prompt, Sampling(max_tokens=6, stop=("zzz", "K", " I"))),
            ask(prompt, Sampling(max_tokens=2)),
        ],
    )
    assert plain.text == " H I K L M N"  # it is a small model
    assert (plain.finish_reason, stopped.finish_reason, short.finish_reason) == ("length", "stop", "length")
    assert stopped.text == " H I "
    assert tokenizer.decode(stopped.completion_ids) == " H I K", "the token that completed the stop is kept"
    assert inside.text == " H"
    assert short.text == " H I"
    assert len(short.completion_ids) == len(short.logprobs) == 2
    opened, prefilled = answers(
        real_engine,
        [
            ModelRequest(Sampling(max_tokens=40), 0, messages=(Message("user", "Say hello."),)),
            ModelRequest(
                Sampling(max_tokens=4, stop=("\n", ".", ",")),
                0,
                messages=(Message("user", "What is 2 + 2?"), Message("assistant", "2 + 2 =")),
            ),
        ],
    )
    assert tokenizer.decode(opened.prompt_ids).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert opened.finish_reason == "stop"
    assert opened.completion_ids[-1] == 2
    assert "<|im_end|>" not in opened.text
    assert tokenizer.decode(prefilled.prompt_ids).endswith("assistant\n2 + 2 =")
    assert prefilled.text.strip() == "4"


def make_adapter(model_dir: Path, folder: Path, steps: int) -> Path:
    """An adapter of the real trainer, pushed hard towards one answer (or untouched, for 0 steps)."""
    settings = TrainSettings(objective=Objective.BEST_OF_N, learning_rate=3e-2, rank=4)
    trainer = Trainer(model_dir, settings, seed=3)
    call = TrainCall((65, 42), (500, 501, 502), (-1.0, -1.0, -1.0))
    for _ in range(steps):
        trainer.step([TrainEpisode("p", 0, 1.0, (call,))])
    trainer.save(folder)
    return folder / "adapter"


def test_adapters_are_merged_kept_and_dropped(tiny: Path, tiny_engine: LocalEngine, tmp_path: Path) -> None:
    untouched = make_adapter(tiny, tmp_path / "0", 0)
    trained = make_adapter(tiny, tmp_path / "1", 30)
    sampling = Sampling(max_tokens=3)
    prompt = load_tokenizer(tiny).decode([65, 42])
    base, zero, moved, base_again = answers(
        tiny_engine, [ask(prompt, sampling, adapter=a) for a in (None, str(untouched), str(trained), None)]
    )
    assert zero.completion_ids == base.completion_ids == base_again.completion_ids
    assert zero.logprobs == pytest.approx(base.logprobs, abs=1e-5)
    assert moved.completion_ids == (500, 501, 502)
    assert tiny_engine.stats.models_merged == 2
    copies = []
    for number in range(3):
        copies.append(tmp_path / f"copy{number}")
        copies[-1].symlink_to(untouched)
    answers(tiny_engine, [ask(prompt, sampling, adapter=str(trained))])
    assert tiny_engine.stats.models_merged == 2, "kept"
    answers(tiny_engine, [ask(prompt, sampling, adapter=str(copy)) for copy in copies])
    answers(tiny_engine, [ask(prompt, sampling, adapter=str(trained))])
    assert tiny_engine.stats.models_merged == 6, "three are kept, the longest unused goes"


def test_errors_stay_with_their_call(tiny_engine: LocalEngine, tmp_path: Path) -> None:
    long = "word " * 2100
    bad = [
        ask(""),
        ask(long),
        ask("x", Sampling(max_tokens=0)),
        ModelRequest(Sampling(), 0),
        ModelRequest(Sampling(), 0, prompt="x", messages=(Message("user", "y"),)),
        ModelRequest(Sampling(), 0, messages=(Message("robot", "y"),)),
    ]
    good = [ask("Once", Sampling(max_tokens=3), seed) for seed in range(4)]
    mixed = [r for pair in zip(bad[:4], good, strict=True) for r in pair] + bad[4:]
    futures = [tiny_engine.submit(request) for request in mixed]
    lost = tiny_engine.submit(ask("x", adapter=str(tmp_path / "nowhere")))
    for request, future in zip(mixed, futures, strict=True):
        if request in good:
            assert len(future.result(timeout=60).completion_ids) == 3
        else:
            with pytest.raises(RequestError):
                future.result(timeout=60)
    with pytest.raises(EngineError, match="no adapter"):
        lost.result(timeout=60)
    assert answers(tiny_engine, [good[0]])[0].finish_reason == "length", "the worker lives on"


def test_generation_ends_at_the_context(tiny_engine: LocalEngine) -> None:
    (answer,) = answers(tiny_engine, [ask("a " * 2040, Sampling(max_tokens=5000))])
    assert 2000 < len(answer.prompt_ids) < 2048
    assert len(answer.prompt_ids) + len(answer.completion_ids) == 2048
    assert answer.finish_reason == "length"


def test_deterministic_mode_is_bitwise(tiny: Path) -> None:
    sampling = Sampling(temperature=1, max_tokens=6)
    requests = [ask(SHOTS + QUESTION.format(sum_), sampling, seed) for seed, sum_ in enumerate(SUMS)]
    runs = []
    for load in (requests, requests[::-1] * 2, [*requests[3:], ask("x"), *requests[:3]]):
        engine = LocalEngine(tiny, adapter_path=Path, deterministic=True, threads=2)
        try:
            runs.append(dict(zip(load, answers(engine, load), strict=True)))
        finally:
            engine.close()
    for request in requests:
        assert runs[0][request] == runs[1][request] == runs[2][request]


def test_many_rows_join_and_leave_under_small_limits(tiny: Path) -> None:
    """More calls than rows, three adapters' worth of turns, uneven lengths: every call gets its own answer."""
    engine = LocalEngine(tiny, adapter_path=Path, max_rows=5, threads=2)
    requests = [ask(f"{i % 7} apples", Sampling(temperature=1, max_tokens=1 + i % 6), seed=i) for i in range(60)]
    try:
        crowd = answers(engine, requests)
        for index in (0, 17, 44, 59):
            assert answers(engine, [requests[index]])[0].completion_ids == crowd[index].completion_ids
    finally:
        engine.close()
    assert [len(c.completion_ids) <= 1 + i % 6 for i, c in enumerate(crowd)] == [True] * 60


def test_nothing_is_loaded_before_the_first_call_and_close_fails_the_rest(tiny: Path) -> None:
    engine = LocalEngine(tiny, adapter_path=Path)
    assert engine._loaded is None
    assert engine.name == "tiny"
    assert engine.trainable
    futures = [engine.submit(ask("x", Sampling(max_tokens=1500), seed=i)) for i in range(3)]
    time.sleep(0.05)
    engine.close()
    engine.close()
    for future in [*futures, engine.submit(ask("x"))]:
        with pytest.raises(EngineError, match="closed"):
            future.result(timeout=10)


def test_a_model_is_provided_when_the_first_call_comes(tiny: Path) -> None:
    provided: list[Path] = []

    def provide() -> Path:
        provided.append(tiny)
        return tiny

    engine = LocalEngine(provide, adapter_path=Path, threads=2)
    assert (engine.name, LocalEngine(provide, adapter_path=Path, name="given").name) == ("local", "given")
    assert engine.trainable
    assert provided == []
    request = ask("Once", Sampling(max_tokens=3))
    try:
        assert [len(a.completion_ids) for a in answers(engine, [request, request])] == [3, 3]
        assert answers(engine, [request])[0].finish_reason == "length"
    finally:
        engine.close()
    assert provided == [tiny], "once"


def test_a_model_that_cannot_be_provided_fails_the_call_with_the_reason() -> None:
    def provide() -> Path:
        raise BaseModelError("the base model's package is missing")

    engine = LocalEngine(provide, adapter_path=Path, threads=2)
    try:
        with pytest.raises(EngineError, match="package is missing"):
            engine.submit(ask("Once")).result(timeout=60)
    finally:
        engine.close()


def test_importing_the_engine_is_cheap() -> None:
    code = "import sys, training.engine; print('torch' in sys.modules, 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]
