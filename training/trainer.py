"""The weight lever itself: LoRA steps on recorded episodes, with checkpoints that continue bit for bit.

One iteration of a WeightUpdate is: roll out with the current Adapter (elsewhere), then `Trainer.step` on the scored
episodes, then `Trainer.save`. A step trains on exactly the token ids that were sampled, against the log-probabilities
recorded then; text is never tokenised again.

    trainer = Trainer(model_dir, settings, seed=1, start_adapter=incumbent)
    report = trainer.step(episodes)
    trainer.save(folder / f"{trainer.iteration:04d}")      # .../adapter is a plain PEFT folder

Nothing in a step draws a random number, so what a checkpoint needs is the adapter, the optimiser's state and the
iteration; `Trainer.load` then goes on with the same bits on the same machine. The seed enters once, in the first
adapter's initialisation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from agents.decision import TrainSettings
from training import checkpoint
from training.checkpoint import CheckpointError
from training.loading import load_model
from training.objectives import IMPLEMENTED, NothingToLearn
from training.packing import TokenTree

MICRO_BATCH_TOKENS = 768
"""The most tokens of one packed pass (a longer single call makes its own). Bounds memory; more gains little speed."""


@dataclass(frozen=True)
class TrainCall:
    """One model call as sampled; `logprobs` in nats, one a completion token."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class TrainEpisode:
    """One scored Episode. All its calls share its reward."""

    problem_id: str
    sample: int
    reward: float
    calls: tuple[TrainCall, ...]


@dataclass(frozen=True)
class StepReport:
    """What a step saw and did. Means over tokens are over the tokens trained on, in the last pass."""

    iteration: int
    loss: float
    mean_reward: float
    groups: int
    groups_alive: int
    """Groups that carried signal for the objective."""
    episodes_used: int
    tokens: int
    """Completion tokens trained on."""
    tokens_computed: int
    """Tokens that a pass computed, after sharing common prefixes."""
    grad_norm: float
    """Before clipping."""
    ratio_mean: float
    """Mean of p_now / p_when_sampled; far from 1 in the first pass means engine and trainer disagree."""
    kl: float
    """Estimate of KL(sampling policy || weights before the last update), nats a token."""
    clip_fraction: float
    """Share of tokens whose ratio lies outside 1 +- clip."""
    entropy: float
    """Mean -logprob of all sampled tokens as recorded, nats: falls towards 0 as answers collapse to one."""


@dataclass(frozen=True)
class _MicroBatch:
    """A packed tree of N nodes; K of them predict a trained token; T trained tokens, duplicates included."""

    ids_N: torch.Tensor
    positions_N: torch.Tensor
    mask_NN: torch.Tensor
    predicting_K: torch.Tensor
    row_T: torch.Tensor
    target_T: torch.Tensor
    old_logp_T: torch.Tensor
    weight_T: torch.Tensor
    share_T: torch.Tensor
    """1 / (episodes averaged over * tokens of the token's episode)."""


class Trainer:
    """A LoRA adapter under training, with its own copy of the base weights (fp32).

    Args:
        model_dir: a model folder (`training.base_model`).
        settings: the WeightUpdate's settings; the learning rate stays constant.
        seed: of a new adapter's initialisation.
        device: a torch device.
        start_adapter: a PEFT folder to go on from (the incumbent's); its own rank and alpha then hold.
        threads: CPU threads; None leaves torch's own choice.
    """

    def __init__(
        self,
        model_dir: Path,
        settings: TrainSettings,
        *,
        seed: int,
        device: str = "cpu",
        start_adapter: Path | None = None,
        threads: int | None = None,
    ) -> None:
        self.settings = settings
        self.seed = seed
        self.iteration = 0
        self._device = device
        self._threads = threads
        self._base_name = model_dir.name
        self._objective = IMPLEMENTED[settings.objective]
        base = load_model(model_dir, device)
        if start_adapter is not None:
            self._model = PeftModel.from_pretrained(base, start_adapter, is_trainable=True)
        else:
            config = LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,
                lora_dropout=0.0,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self._model = get_peft_model(base, config)
        self._model.eval()  # there is no dropout; gradients flow all the same
        self._parameters: dict[str, torch.nn.Parameter] = {
            name: parameter for name, parameter in self._model.named_parameters() if parameter.requires_grad
        }
        self._optimizer = torch.optim.AdamW(self._parameters.values(), lr=settings.learning_rate, weight_decay=0.0)

    def step(self, episodes: Sequence[TrainEpisode]) -> StepReport:
        """One iteration's update: `settings.epochs` passes over the episodes, an optimiser step each.

        Order does not matter: episodes are grouped by problem and sorted. Within an episode tokens are averaged, so a
        long completion weighs no more than a short one; then episodes are averaged.

        Raises:
            NothingToLearn: no group carries signal for the objective. Weights, state and iteration are unchanged.
            ValueError: a call's tokens and log-probabilities differ in number.
        """
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        groups: dict[str, list[TrainEpisode]] = {}
        episodes = sorted(episodes, key=lambda episode: (episode.problem_id, episode.sample))
        for episode in episodes:
            groups.setdefault(episode.problem_id, []).append(episode)
        used: list[tuple[TrainEpisode, float]] = []
        alive = 0
        for group in groups.values():
            weights = self._objective.weigh([episode.reward for episode in group], self.settings)
            kept = [
                (episode, weight)
                for episode, weight in zip(group, weights, strict=True)
                if weight != 0 and any(call.completion_ids for call in episode.calls)
            ]
            used += kept
            alive += bool(kept)
        if not used:
            raise NothingToLearn(
                f"none of {len(groups)} groups has signal for {self.settings.objective}: no step was taken"
            )
        averaged = len(used) if self._objective.over_kept else len(episodes)
        batches = self._pack(used, averaged)
        for _ in range(self.settings.epochs):
            loss, sums, grad_norm = self._pass(batches)
        self.iteration += 1
        tokens = sum(len(batch.row_T) for batch in batches)
        recorded = [logp for episode in episodes for call in episode.calls for logp in call.logprobs]
        return StepReport(
            iteration=self.iteration,
            loss=loss,
            mean_reward=sum(episode.reward for episode in episodes) / len(episodes),
            groups=len(groups),
            groups_alive=alive,
            episodes_used=len(used),
            tokens=tokens,
            tokens_computed=sum(len(batch.ids_N) for batch in batches),
            grad_norm=grad_norm,
            ratio_mean=sums[0] / tokens,
            kl=sums[1] / tokens,
            clip_fraction=sums[2] / tokens,
            entropy=-sum(recorded) / len(recorded),
        )

    def save(self, directory: Path) -> None:
        """Write a checkpoint, whole or not at all: `adapter/` (plain PEFT), optimiser state, iteration.

        Equal states give equal bytes, so `adapter/` can be content-addressed.
        """
        checkpoint.write(directory, self._fill)

    @classmethod
    def load(cls, directory: Path, model_dir: Path, *, device: str = "cpu", threads: int | None = None) -> Self:
        """Go on from a checkpoint; settings and seed come from it.

        Raises:
            CheckpointError: incomplete, damaged, or made on another base model.
        """
        checkpoint.verify(directory)
        state = json.loads((directory / "state.json").read_text())
        if state["base_model"] != model_dir.name:
            raise CheckpointError(f"{directory} was trained on {state['base_model']}, not on {model_dir.name}")
        trainer = cls(
            model_dir,
            TrainSettings.model_validate(state["settings"]),
            seed=state["seed"],
            device=device,
            start_adapter=directory / "adapter",
            threads=threads,
        )
        trainer.iteration = state["iteration"]
        moments = load_file(directory / "optimizer.safetensors", device=device)
        for name, parameter in trainer._parameters.items():
            found = {key: moments[f"{name}:{key}"] for key in _MOMENTS if f"{name}:{key}" in moments}
            if found:
                trainer._optimizer.state[parameter] = found
        return trainer

    def _fill(self, work: Path) -> None:
        adapter = work / "adapter"
        adapter.mkdir()
        weights = {
            name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(self._model).items()
        }
        save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        config = self._model.peft_config["default"].to_dict()
        config |= {"inference_mode": True, "base_model_name_or_path": self._base_name}
        (adapter / "adapter_config.json").write_text(
            # PEFT holds module names in sets, whose order changes from process to process.
            json.dumps(config, indent=2, sort_keys=True, default=sorted) + "\n"
        )
        moments = {
            f"{name}:{key}": self._optimizer.state[parameter][key].cpu()
            for name, parameter in self._parameters.items()
            if parameter in self._optimizer.state
            for key in _MOMENTS
        }
        save_file(moments, work / "optimizer.safetensors")
        state = {
            "iteration": self.iteration,
            "seed": self.seed,
            "base_model": self._base_name,
            "settings": self.settings.model_dump(mode="json"),
        }
        (work / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")

    def _pass(self, batches: Sequence[_MicroBatch]) -> tuple[float, list[float], float]:
        """One optimiser step. Returns the loss, sums of (ratio, KL, outside the clip) over tokens, the norm."""
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        sums_3 = torch.zeros(3, dtype=torch.float64)
        for batch in batches:
            logp_T = self._logp(batch)
            loss_T = self._objective.loss(logp_T, batch.old_logp_T, batch.weight_T, self.settings)
            loss = (loss_T * batch.share_T).sum()
            torch.autograd.backward([loss])
            total += float(loss.detach())
            with torch.no_grad():
                log_ratio_T = (logp_T - batch.old_logp_T).double().cpu()
                ratio_T = log_ratio_T.exp()
                outside_T = (ratio_T - 1).abs() > self.settings.clip
                sums_3 += torch.stack([ratio_T.sum(), (ratio_T - 1 - log_ratio_T).sum(), outside_T.double().sum()])
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self.settings.max_grad_norm)
        self._optimizer.step()
        return total, sums_3.tolist(), float(norm)

    def _logp(self, batch: _MicroBatch) -> torch.Tensor:
        """Log-probabilities of the trained tokens under the current weights, with gradient. The head, the widest layer
        of a small model, is computed only where a trained token is predicted."""
        logits_KV = self._model(
            input_ids=batch.ids_N[None],
            position_ids=batch.positions_N[None],
            attention_mask=batch.mask_NN[None, None],
            use_cache=False,
            logits_to_keep=batch.predicting_K,
        ).logits[0]
        norm_K = torch.logsumexp(logits_KV, dim=-1)
        logp_T: torch.Tensor = logits_KV[batch.row_T, batch.target_T] - norm_K[batch.row_T]
        return logp_T

    def _pack(self, used: Sequence[tuple[TrainEpisode, float]], averaged: int) -> list[_MicroBatch]:
        """Fill micro-batches with calls in order (of problem and sample, so that neighbours share a prompt)."""
        batches = []
        tree, tokens = TokenTree(), list[_Token]()
        for episode, weight in used:
            share = 1 / (averaged * sum(len(call.completion_ids) for call in episode.calls))
            for call in episode.calls:
                if len(call.completion_ids) != len(call.logprobs):
                    raise ValueError(
                        f"{episode.problem_id}, sample {episode.sample}: {len(call.completion_ids)} tokens, "
                        f"{len(call.logprobs)} log-probabilities"
                    )
                if not call.completion_ids:
                    continue
                # The last token predicts nothing that is trained on, so it need not be computed.
                ids = call.prompt_ids + call.completion_ids[:-1]
                if tokens and len(tree) + tree.new_tokens(ids) > MICRO_BATCH_TOKENS:
                    batches.append(self._micro_batch(tree, tokens))
                    tree, tokens = TokenTree(), []
                path = tree.add(ids)[len(call.prompt_ids) - 1 :]
                for node, target, old in zip(path, call.completion_ids, call.logprobs, strict=True):
                    tokens.append(_Token(node, target, old, weight, share))
        batches.append(self._micro_batch(tree, tokens))
        return batches

    def _micro_batch(self, tree: TokenTree, tokens: Sequence[_Token]) -> _MicroBatch:
        predicting = sorted({token.node for token in tokens})
        row = {node: index for index, node in enumerate(predicting)}
        device = self._device
        return _MicroBatch(
            ids_N=torch.tensor(tree.tokens, device=device),
            positions_N=torch.tensor(tree.depths, device=device),
            mask_NN=torch.from_numpy(tree.mask()).to(device),
            predicting_K=torch.tensor(predicting, device=device),
            row_T=torch.tensor([row[token.node] for token in tokens], device=device),
            target_T=torch.tensor([token.target for token in tokens], device=device),
            old_logp_T=torch.tensor([token.old_logp for token in tokens], device=device),
            weight_T=torch.tensor([token.weight for token in tokens], device=device),
            share_T=torch.tensor([token.share for token in tokens], device=device),
        )


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Token:
    """A trained token: the node that predicts it, its id, its recorded log-probability, weight and share."""

    node: int
    target: int
    old_logp: float
    weight: float
    share: float
