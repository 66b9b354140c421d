"""Training steps: gradients equal the plain computation, signal moves weights, checkpoints continue bit for bit."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from agents.archive import Objective
from agents.decision import TrainSettings
from agents.model import ModelRequest, Sampling
from training import trainer as trainer_module
from training.checkpoint import CheckpointError
from training.engine import LocalEngine
from training.loading import load_model
from training.objectives import NothingToLearn, clipped_policy_loss, grpo_advantages
from training.trainer import TrainCall, TrainEpisode, Trainer

GRPO = TrainSettings(objective=Objective.GRPO, learning_rate=1e-3, rank=4, alpha=8)
CLONE = TrainSettings(objective=Objective.BEST_OF_N, learning_rate=1e-3, rank=4, alpha=8, top_k=2)


def make_episodes(seed: int, problems: int = 4, samples: int = 5) -> list[TrainEpisode]:
    """Episodes of one or two calls whose prompts share few-shot examples and whose answers often coincide."""
    rng = random.Random(seed)
    shots = tuple(rng.randrange(100, 900) for _ in range(30))
    episodes = []
    for problem in range(problems):
        own = tuple(rng.randrange(100, 900) for _ in range(rng.randrange(3, 9)))
        for sample in range(samples):
            calls = []
            for _ in range(rng.choice([1, 1, 2])):
                ids = tuple(rng.choice([40, 41, 42]) for _ in range(rng.randrange(1, 5)))
                calls.append(TrainCall(shots + own, ids, tuple(rng.uniform(-12, -9) for _ in ids)))
            episodes.append(TrainEpisode(f"p{problem}", sample, float(rng.random() < 0.4), tuple(calls)))
    return episodes


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer._parameters.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def folder_sum(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(path.name.encode() + path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


@pytest.mark.parametrize("micro_batch", [768, 40])
def test_gradients_equal_the_plain_computation(tiny: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int) -> None:
    monkeypatch.setattr(trainer_module, "MICRO_BATCH_TOKENS", micro_batch)
    settings = GRPO.model_copy(update={"max_grad_norm": 1e9, "clip": 1e9})
    trainer = Trainer(tiny, settings, seed=1)
    with torch.no_grad():  # B is zero at the start, which would hide A's gradient
        for name, parameter in trainer._parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    episodes = make_episodes(1, problems=3, samples=4)

    groups: dict[str, list[TrainEpisode]] = {}
    for episode in episodes:
        groups.setdefault(episode.problem_id, []).append(episode)
    loss = torch.zeros(())
    for group in groups.values():
        advantages_G = grpo_advantages(torch.tensor([episode.reward for episode in group]))
        for episode, advantage in zip(group, advantages_G, strict=True):
            losses = []
            for call in episode.calls:
                ids = torch.tensor([call.prompt_ids + call.completion_ids])
                logp = torch.log_softmax(trainer._model(ids).logits[0], -1)
                start = len(call.prompt_ids) - 1
                picked_T = torch.stack([logp[start + i, t] for i, t in enumerate(call.completion_ids)])
                losses.append(clipped_policy_loss(picked_T, torch.tensor(call.logprobs), advantage, 1e9))
            loss = loss + torch.cat(losses).mean() / len(episodes)
    torch.autograd.backward([loss])
    expected = {name: p.grad.clone() for name, p in trainer._parameters.items() if p.grad is not None}
    assert len(expected) == len(trainer._parameters)

    report = trainer.step(episodes)
    assert report.loss == pytest.approx(float(loss.detach()), rel=1e-4)
    for name, parameter in trainer._parameters.items():
        assert parameter.grad is not None
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4 * scale, rtol=1e-3)
    all_tokens = sum(len(c.prompt_ids + c.completion_ids) for e in episodes for c in e.calls)
    assert report.tokens_computed < all_tokens / (4 if micro_batch > 100 else 1.5)


def test_first_pass_agrees_with_the_engine(tiny: Path) -> None:
    """Log-probabilities recorded by the engine are those of the trainer: the ratio starts at 1."""
    engine = LocalEngine(tiny, adapter_path=Path, threads=2)
    try:
        futures = [
            (
                p,
                s,
                engine.submit(ModelRequest(Sampling(temperature=1, max_tokens=5), p * 8 + s, prompt=f"Q {p}")),
            )
            for p in range(3)
            for s in range(4)
        ]
        episodes = []
        for p, s, future in futures:
            c = future.result()
            call = TrainCall(c.prompt_ids, c.completion_ids, c.logprobs)
            episodes.append(TrainEpisode(str(p), s, float(s % 2), (call,)))
    finally:
        engine.close()
    report = Trainer(tiny, GRPO, seed=1).step(episodes)
    assert report.ratio_mean == pytest.approx(1, abs=1e-4)
    assert report.kl == pytest.approx(0, abs=1e-7)
    assert report.clip_fraction == 0
    assert (report.groups, report.groups_alive, report.episodes_used) == (3, 3, 12)
    assert report.mean_reward == 0.5


@pytest.mark.parametrize("settings", [GRPO, CLONE])
def test_rewarded_answers_become_likelier(tiny: Path, settings: TrainSettings) -> None:
    trainer = Trainer(tiny, settings.model_copy(update={"learning_rate": 1e-2}), seed=1)
    model = load_model(tiny, "cpu")
    prompt = (300, 301, 302)

    def logp(token: int) -> float:
        with torch.no_grad():
            return float(torch.log_softmax(trainer._model(torch.tensor([prompt])).logits[0, -1], -1)[token])

    with torch.no_grad():
        old = torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1], -1)
    good, bad = 50, 51
    episodes = [
        TrainEpisode("p", s, r, (TrainCall(prompt, (token,), (float(old[token]),)),))
        for s, (token, r) in enumerate([(good, 1.0), (bad, 0.0), (bad, 0.0)])
    ]
    before = logp(good), logp(bad)
    assert before[0] == pytest.approx(float(old[good]), abs=1e-4), "a fresh adapter changes nothing"
    report = trainer.step(episodes)
    assert logp(good) > before[0]
    if settings is GRPO:
        assert logp(bad) < before[1]
        assert report.tokens == 3
    else:
        assert report.tokens == 1


@pytest.mark.parametrize("settings", [GRPO, CLONE])
def test_no_signal_no_step(tiny: Path, settings: TrainSettings) -> None:
    trainer = Trainer(tiny, settings, seed=1)
    before = weights_of(trainer)
    silent = [TrainEpisode(e.problem_id, e.sample, 0.0, e.calls) for e in make_episodes(1)]
    with pytest.raises(NothingToLearn, match="no step"):
        trainer.step(silent)
    with pytest.raises(NothingToLearn):
        trainer.step([])
    assert trainer.iteration == 0
    assert same(before, weights_of(trainer))


def test_silent_groups_cost_nothing_and_order_does_not_matter(tiny: Path) -> None:
    episodes = make_episodes(2)
    silent = [TrainEpisode("z", s, 1.0, episodes[0].calls) for s in range(5)]
    one, other = Trainer(tiny, GRPO, seed=1), Trainer(tiny, GRPO, seed=1)
    first = one.step(episodes + silent)
    shuffled = episodes + silent
    random.Random(0).shuffle(shuffled)
    second = other.step(shuffled)
    assert first == second
    assert same(weights_of(one), weights_of(other))
    assert first.groups == 5
    assert first.groups_alive == 4
    assert first.episodes_used == 20


def test_epochs_are_passes(tiny: Path) -> None:
    settings = GRPO.model_copy(update={"epochs": 3, "learning_rate": 1e-2})
    trainer = Trainer(tiny, settings, seed=1)
    report = trainer.step(make_episodes(3))
    assert report.iteration == trainer.iteration == 1
    steps = {int(trainer._optimizer.state[p]["step"]) for p in trainer._parameters.values()}
    assert steps == {3}


def test_mismatched_record_is_refused(tiny: Path) -> None:
    call = TrainCall((1, 2), (3, 4), (-1.0,))
    episodes = [TrainEpisode("p", s, float(s), (call,)) for s in range(2)]
    with pytest.raises(ValueError, match="2 tokens, 1 log"):
        Trainer(tiny, GRPO, seed=1).step(episodes)


@pytest.mark.parametrize("settings", [GRPO, CLONE])
def test_a_loaded_checkpoint_continues_bit_for_bit(tiny: Path, tmp_path: Path, settings: TrainSettings) -> None:
    batches = [make_episodes(seed) for seed in range(4)]
    straight = Trainer(tiny, settings, seed=9)
    reports = [straight.step(batch) for batch in batches]
    first = Trainer(tiny, settings, seed=9)
    assert [first.step(batch) for batch in batches[:2]] == reports[:2]
    first.save(tmp_path / "2")
    second = Trainer.load(tmp_path / "2", tiny)
    assert (second.iteration, second.seed, second.settings) == (2, 9, settings)
    assert [second.step(batch) for batch in batches[2:]] == reports[2:]
    assert same(weights_of(straight), weights_of(second))
    straight.save(tmp_path / "straight")
    second.save(tmp_path / "resumed")
    assert folder_sum(tmp_path / "straight") == folder_sum(tmp_path / "resumed")
    assert not same(weights_of(straight), weights_of(first))


def test_adapter_is_plain_peft_and_a_later_update_goes_on_from_it(tiny: Path, tmp_path: Path) -> None:
    import json

    from peft import PeftModel

    trainer = Trainer(tiny, GRPO, seed=1)
    trainer.step(make_episodes(1))
    trainer.save(tmp_path / "1")
    adapter = tmp_path / "1" / "adapter"
    assert sorted(path.name for path in adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny", "no path of this machine"
    assert config["target_modules"] == sorted(config["target_modules"]), "same bytes in every process"
    plain = PeftModel.from_pretrained(load_model(tiny, "cpu"), adapter)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, trainer._model(ids).logits)
        assert not torch.allclose(plain(ids).logits, load_model(tiny, "cpu")(ids).logits)
    later = Trainer(tiny, CLONE.model_copy(update={"rank": 64}), seed=5, start_adapter=adapter)
    assert same(weights_of(later), weights_of(trainer))
    assert later.iteration == 0
    later.step(make_episodes(2))
    assert not same(weights_of(later), weights_of(trainer))


@pytest.mark.slow
def test_adapter_bytes_do_not_depend_on_the_process(tiny: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from training.trainer import Trainer, TrainSettings\n"
        "s = TrainSettings(objective='grpo', learning_rate=1e-3, rank=4, alpha=8)\n"
        f"Trainer(Path({str(tiny)!r}), s, seed=1).save(Path(sys.argv[1]))"
    )
    for hash_seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / hash_seed)],
            check=True,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            cwd=Path(__file__).parents[2],
        )
    Trainer(tiny, GRPO, seed=1).save(tmp_path / "3")
    assert len({folder_sum(tmp_path / name) for name in "123"}) == 1


def test_damaged_and_foreign_checkpoints_are_refused(tiny: Path, smollm: Path, tmp_path: Path) -> None:
    Trainer(tiny, GRPO, seed=1).save(tmp_path / "good")
    with pytest.raises(CheckpointError, match="was trained on tiny"):
        Trainer.load(tmp_path / "good", smollm)
    with pytest.raises(CheckpointError):
        Trainer.load(tmp_path / "none", tiny)
    (tmp_path / "good" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        Trainer.load(tmp_path / "good", tiny)
