"""Choosing: the first Scaffold, the problems of a rollout, the gate's verdict, the decision, the arms of the test."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import JsonValue

from agents.archive import Attempt, Estimate, Lever
from agents.decision import SHOT_POOL, Evidence, RewardProbe, ScaffoldDraft, TrainSettings, TrialResult
from agents.episode import Cause
from flows.keys import draw, keyed_seed
from flows.records import ARMS
from flows.state.rollout_rows import RolloutPlan
from flows.state.tables import DecisionRow, GateVerdictRow, GenerationRow
from flows.work.rollouts import plan_rollout, run_all
from flows.workshop import Workshop
from tasks.contract import Problem, Split, TaskKind
from verifiers.gate import GateSchedule, judge
from verifiers.statistics import estimate


def synthesise(shop: Workshop, number: int) -> None:
    """Generation 1: the Meta-Agent writes the first Scaffold, which is the incumbent until something beats it."""
    store = shop.store
    store.begin_generation(number, Lever.FIRST, None)
    draft = shop.meta_agent.first_scaffold(shop.spec, shop.task.examples(), keyed_seed(shop.settings.seed, "meta"))
    store.complete_generation(
        number, scaffold_id=shop.keep_scaffold(draft), note=draft.note, recipe=draft.recipe, accepted=True
    )


# --- which problems -------------------------------------------------------------------------------------------------


def plan_dev(shop: Workshop, row: GenerationRow, gate: int) -> int:
    """The rollout of a Generation on the dev problems of a gate: a fresh block where the task can make one."""
    problems = shop.task.problems(Split.DEV)
    if shop.spec.fresh_dev:
        size = shop.settings.dev_block or shop.spec.dev_block
        block, slot = problems[gate * size : (gate + 1) * size], f"dev/{gate:02d}"
    else:
        block, slot = problems[: shop.settings.dev_block or None], "dev/00"
    return plan_rollout(shop, _plan(row, slot, Split.DEV, block))


def plan_probe(shop: Workshop, after: int) -> int:
    """The incumbent on train problems at temperature 1, in groups: how do rewards vary?"""
    row = shop.store.incumbent()
    chosen = _train_problems(shop, shop.settings.weights.problems, "probe", after)
    samples = shop.settings.weights.samples
    return plan_rollout(shop, _groups(row, f"probe/gen-{after:02d}", chosen, samples, row.adapter_id))


def plan_training(
    shop: Workshop, row: GenerationRow, iteration: int, adapter_id: str | None, settings: TrainSettings
) -> int:
    """The training rollout of an iteration: its own draw of train problems, in groups, with the adapter so far."""
    chosen = _train_problems(shop, settings.problems, "train", row.number, iteration)
    slot = f"train/gen-{row.number:02d}/iter-{iteration:02d}"
    return plan_rollout(shop, _groups(row, slot, chosen, settings.samples, adapter_id))


def plan_test(shop: Workshop, arm: str, row: GenerationRow) -> int:
    """The rollout of an arm on the sealed test; the read is recorded before it is made."""
    problems = shop.task.problems(Split.TEST)[: shop.settings.test_problems]
    rollout_id = plan_rollout(shop, _plan(row, "test", Split.TEST, problems))
    shop.store.record_test_read(arm, row.number, rollout_id)
    return rollout_id


def _train_problems(shop: Workshop, count: int, *key: object) -> list[Problem]:
    pool = shop.task.problems(Split.TRAIN)[SHOT_POOL:]
    return draw(pool, count, shop.settings.seed, *key)


def _plan(row: GenerationRow, slot: str, split: Split, problems: Sequence[Problem]) -> RolloutPlan:
    assert row.scaffold_id is not None, "only a whole generation is rolled out"
    items = [(p.id, 0) for p in problems]
    return RolloutPlan(slot, row.scaffold_id, row.adapter_id, row.number, split, items)


def _groups(
    row: GenerationRow, slot: str, problems: Sequence[Problem], samples: int, adapter_id: str | None
) -> RolloutPlan:
    assert row.scaffold_id is not None, "only a whole generation is rolled out"
    items = [(p.id, sample) for p in problems for sample in range(samples)]
    return RolloutPlan(slot, row.scaffold_id, adapter_id, row.number, Split.TRAIN, items, train_policy=True)


# --- the gate -------------------------------------------------------------------------------------------------------


def judge_candidate(shop: Workshop, number: int, rollouts: tuple[int, int] | None) -> GateVerdictRow:
    """The gate's verdict on a candidate; `rollouts` are (candidate's, incumbent's), None if it could not be made."""
    gate = number - 1
    found = shop.store.verdict(gate)
    if found is not None:
        return found
    incumbent = shop.store.incumbent().number
    schedule = GateSchedule(alpha=shop.settings.alpha, gates=max(1, shop.settings.generations - 1))
    if rollouts is None:
        row = GateVerdictRow(
            run_id=shop.run_id,
            gate=gate,
            generation=number,
            incumbent=incumbent,
            slot="",
            accepted=False,
            n=0,
            difference=0.0,
            low=-1.0,
            high=1.0,
            p_value=1.0,
            alpha=schedule.alpha / schedule.gates,
            minimum_detectable=1.0,
            text="rejected: the candidate could not be made",
        )
    else:
        candidate, standing = ({p: r for (p, _), r in shop.store.rewards(i).items()} for i in rollouts)
        verdict = judge(candidate, standing, schedule, gate)
        row = GateVerdictRow(
            run_id=shop.run_id,
            gate=gate,
            generation=number,
            incumbent=incumbent,
            slot=shop.store.rollout(rollouts[0]).slot,
            accepted=verdict.accepted,
            n=verdict.n,
            difference=verdict.difference,
            low=verdict.low,
            high=verdict.high,
            p_value=verdict.p_value,
            alpha=verdict.alpha,
            minimum_detectable=1.0 if verdict.minimum_detectable is None else verdict.minimum_detectable,
            text=verdict.text,
        )
    shop.store.save_verdict(row)
    return row


# --- the decision ---------------------------------------------------------------------------------------------------


def dev_rewards(shop: Workshop, row: GenerationRow) -> list[float]:
    """All rewards of a Generation's (Scaffold, Adapter) on dev, over every block that it was scored on."""
    if row.scaffold_id is None:
        return []
    rollouts = shop.store.rollouts("dev/", row.scaffold_id, row.adapter_id)
    return [reward for rollout in rollouts for reward in shop.store.rewards(rollout.id or 0).values()]


def gather_evidence(shop: Workshop, after: int, probe_rollout: int | None) -> Evidence:
    """What the Feedback-Agent may see after a Generation."""
    store = shop.store
    rows = store.generations()[:after]
    return Evidence(
        task=shop.spec,
        archive=tuple(_attempt(shop, row) for row in rows),
        incumbent=store.incumbent().number,
        generations_left=shop.settings.generations - after,
        trainable=_why_not_trainable(shop),
        probe=None if probe_rollout is None else _probe(shop, probe_rollout),
        causes=_last_causes(shop, rows[-1]),
    )


def _attempt(shop: Workshop, row: GenerationRow) -> Attempt:
    rewards = dev_rewards(shop, row)
    dev = None
    if rewards:
        found = estimate(rewards)
        dev = Estimate(found.n, found.mean, found.low, found.high)
    return shop.store.attempt(row, dev)


def _why_not_trainable(shop: Workshop) -> str | None:
    if shop.spec.kind is TaskKind.PROGRAM:
        return "no trainable model: the scaffold is a program over the task's files and calls no model"
    if not shop.engine.trainable:
        return f"the model behind {shop.engine.name} cannot be trained"
    return None


def _probe(shop: Workshop, rollout_id: int) -> RewardProbe:
    groups: dict[str, list[float]] = {}
    for (problem_id, _), reward in shop.store.rewards(rollout_id).items():
        groups.setdefault(problem_id, []).append(reward)
    return RewardProbe(tuple(tuple(group) for group in groups.values()))


def _last_causes(shop: Workshop, row: GenerationRow) -> dict[Cause, int]:
    if row.scaffold_id is None:
        return {}
    rollouts = shop.store.rollouts("dev/", row.scaffold_id, row.adapter_id)
    return shop.store.causes(rollouts[-1].id or 0) if rollouts else {}


def decide(shop: Workshop, after: int, probe_rollout: int | None) -> DecisionRow:
    """Ask the Feedback-Agent what comes after a Generation, and record it with its evidence."""
    found = shop.store.decision(after)
    if found is not None:
        return found
    evidence = gather_evidence(shop, after, probe_rollout)
    incumbent = shop.store.incumbent()

    def try_out(drafts: Sequence[ScaffoldDraft], problems: int) -> Sequence[TrialResult]:
        return _try_out(shop, after, incumbent, drafts, problems)

    seed = keyed_seed(shop.settings.seed, "decide", after)
    decision = shop.feedback_agent.decide(evidence, shop.task.examples(), seed, try_out)
    scaffold_id = shop.keep_scaffold(decision.draft) if decision.draft else None
    return shop.store.save_decision(after, decision, scaffold_id, _evidence_record(evidence))


def _try_out(
    shop: Workshop, after: int, incumbent: GenerationRow, drafts: Sequence[ScaffoldDraft], problems: int
) -> list[TrialResult]:
    if shop.spec.kind is TaskKind.PROGRAM:
        chosen = list(shop.task.asked(Split.TRAIN))  # a fixed part of train, whatever number is wished
    else:
        chosen = _train_problems(shop, problems, "trial", after, problems)
    plans = [
        RolloutPlan(
            slot=f"trial/gen-{after:02d}/{problems}",
            scaffold_id=shop.keep_scaffold(draft),
            adapter_id=incumbent.adapter_id,
            generation=after,
            split=Split.TRAIN,
            items=[(p.id, 0) for p in chosen],
        )
        for draft in drafts
    ]
    ids = [plan_rollout(shop, plan) for plan in plans]
    shop.begin_step(f"try out {len(ids)} drafts on {len(chosen)} train problems", sorted(set(ids)))
    run_all(shop, sorted(set(ids)))
    return [TrialResult(tuple(shop.store.rewards(i).values()), shop.store.causes(i)) for i in ids]


def _evidence_record(evidence: Evidence) -> JsonValue:
    return {
        "incumbent": evidence.incumbent,
        "generations_left": evidence.generations_left,
        "trainable": evidence.trainable,
        "probe": [list(group) for group in evidence.probe.groups] if evidence.probe else None,
        "causes": {str(cause): count for cause, count in evidence.causes.items()},
        "archive": [
            {
                "generation": a.generation,
                "lever": str(a.lever),
                "dev": None if a.dev is None else [a.dev.n, a.dev.mean, a.dev.low, a.dev.high],
                "accepted": a.accepted,
            }
            for a in evidence.archive
        ],
    }


def tell_decision(shop: Workshop, after: int) -> None:
    """One line for the watcher: the lever and why."""
    row = shop.store.decision(after)
    assert row is not None, "a decision is told once it is recorded"
    reasons = row.reasons if isinstance(row.reasons, list) else []
    shop.progress.note(f"after generation {after}: {row.lever}; " + "; ".join(str(r) for r in reasons))


def begin_candidate(shop: Workshop, number: int) -> GenerationRow:
    """Write the next Generation's intent, as decided after the one before it."""
    found = shop.store.generation(number)
    if found is not None:
        return found
    incumbent = shop.store.incumbent()
    decision = shop.store.decision(number - 1)
    assert decision is not None, "a candidate follows from a decision"
    if decision.lever == Lever.WEIGHTS:
        settings = TrainSettings.model_validate(decision.settings)
        size = f"{settings.iterations} iterations of {settings.problems} problems x {settings.samples} samples"
        return shop.store.begin_generation(
            number,
            Lever.WEIGHTS,
            incumbent.number,
            scaffold_id=incumbent.scaffold_id,
            objective=settings.objective,
            note=f"{settings.objective}: {size}",
            recipe=incumbent.recipe,
        )
    assert decision.scaffold_id is not None, "a harness update names its scaffold"
    return shop.store.begin_generation(
        number,
        Lever.HARNESS,
        incumbent.number,
        scaffold_id=decision.scaffold_id,
        adapter_id=incumbent.adapter_id,
        note=decision.note,
        recipe=decision.recipe,
    )


# --- the arms of the sealed test ------------------------------------------------------------------------------------


def choose_arms(shop: Workshop) -> dict[str, GenerationRow]:
    """Which Generation each arm of the sealed test is: the first Scaffold, the best harness-only candidate on dev, and
    the incumbent at the end.

    Dev blocks differ in difficulty, so raw dev means of different blocks are not compared. Each candidate has a
    paired difference to the incumbent of its gate, on the same problems; added up from the first Scaffold on, these
    differences rank the candidates. Rejected ones take part, so that H is not sandbagged by a strict gate; ties go to
    the earlier.
    """
    store = shop.store
    rows = {row.number: row for row in store.generations()}
    worth = {1: 0.0}
    for verdict in store.verdicts():
        if verdict.n and rows[verdict.generation].adapter_id is None:
            worth[verdict.generation] = worth[verdict.incumbent] + verdict.difference
    best = max(worth, key=lambda number: (worth[number], -number))
    return dict(zip(ARMS, (rows[1], rows[best], store.incumbent()), strict=True))
