"""The loop, on one page: propose, roll out, score, gate, decide, train; then the sealed test.

Run it by `sia run TASK`. Each Generation is one candidate. The gate lets it replace the incumbent only if it is better
beyond noise on the same problems; then the Feedback-Agent decides which lever makes the next candidate: a new Scaffold
with the weights fixed, or a WeightUpdate with the Scaffold fixed. Every line first looks in the state and does only
what is missing, so this same flow is also how a Run resumes.
"""

from __future__ import annotations

from prefect import flow
from prefect.futures import PrefectFuture

from agents.archive import Lever
from flows import steps
from flows.prefect_runs import enter_flow_run
from flows.publish import publish_result
from flows.state.tables import GenerationRow, WorkStatus
from flows.work import choices, weights
from flows.workshop import Workshop, workshop


@flow(name="improve", flow_run_name="{run_id}")
def improve(run_id: str) -> None:
    """Improve an agent on a task, as the Run's settings say, until its Generations are used up."""
    shop = workshop(run_id)
    enter_flow_run(shop)
    propose_first(shop)
    number = 1
    while (lever := decide_next(shop, after=number)) is not Lever.STOP:
        number += 1
        candidate = choices.begin_candidate(shop, number)
        announce(shop, candidate)
        if lever is Lever.WEIGHTS:
            update_weights(shop, candidate)
        pass_gate(shop, number)
    open_sealed_test(shop)
    publish_result(shop)


def propose_first(shop: Workshop) -> None:
    """Generation 1: written by the Meta-Agent, measured on the first dev block, incumbent until something beats it."""
    first = shop.store.generation(1)
    if first is None or first.status != WorkStatus.DONE:
        shop.progress.generation(1, shop.settings.generations, Lever.FIRST, "the Meta-Agent writes the first scaffold")
        steps.synthesise_scaffold(shop.run_id, 1, label(shop, 1, "scaffold synthesis"))
        first = shop.store.generation(1)
    assert first is not None, "scaffold synthesis makes generation 1"
    announce(shop, first)
    measure(shop, choices.plan_dev(shop, first, gate=0))


def measure(shop: Workshop, *rollout_ids: int) -> None:
    """Roll out and score, whatever of it is still to be done; shards of all the rollouts run side by side."""
    shards: list[PrefectFuture[None]] = []
    waiting = [i for i in rollout_ids if shop.store.rollout(i).status != WorkStatus.DONE]
    if waiting:
        shop.begin_step(f"roll out {shop.store.rollout(waiting[0]).slot}", waiting)
    for rollout_id in waiting:
        row = shop.store.rollout(rollout_id)
        for shard in shop.store.unfinished_shards(rollout_id):
            name = label(shop, row.generation, f"roll out {row.slot} shard {shard}")
            shards.append(steps.roll_out_shard.submit(shop.run_id, rollout_id, shard, name))
    for future in shards:
        future.result()
    for rollout_id in waiting:
        row = shop.store.rollout(rollout_id)
        steps.score_rollout(shop.run_id, rollout_id, label(shop, row.generation, f"score {row.slot}"))


def decide_next(shop: Workshop, after: int) -> Lever:
    """The Feedback-Agent's decision after a Generation; how rewards vary is probed first where it depends on that."""
    found = shop.store.decision(after)
    if found is not None:
        return Lever(found.lever)
    if after >= shop.settings.generations:
        return Lever.STOP
    probe = None
    if shop.feedback_agent.needs_probe(choices.gather_evidence(shop, after, None)):
        probe = choices.plan_probe(shop, after)
        measure(shop, probe)
    shop.progress.step("feedback decision", None)
    lever = Lever(steps.decide(shop.run_id, after, probe, label(shop, after, "feedback decision")))
    choices.tell_decision(shop, after)
    return lever


def update_weights(shop: Workshop, candidate: GenerationRow) -> None:
    """The weight lever: iterations of (roll out with the adapter so far, score, step), then the adapter is the
    candidate's."""
    if candidate.status != WorkStatus.INTENDED:
        return
    update, settings = weights.begin_update(shop, candidate)
    adapter_id = update.start_adapter_id
    for iteration in range(1, settings.iterations + 1):
        rollout_id = choices.plan_training(shop, candidate, iteration, adapter_id, settings)
        measure(shop, rollout_id)
        shop.progress.step(f"train step {iteration}/{settings.iterations}", None)
        name = label(shop, candidate.number, f"{settings.objective} step {iteration}/{settings.iterations}")
        adapter_id = steps.train_step(shop.run_id, candidate.number, iteration, rollout_id, name)
    weights.finish_update(shop, candidate.number)


def pass_gate(shop: Workshop, number: int) -> None:
    """Candidate and incumbent on the same dev problems, and the verdict."""
    if shop.store.verdict(number - 1) is not None:
        return
    candidate = shop.store.generation(number)
    assert candidate is not None, "a candidate is begun before it is judged"
    rollouts = None
    if candidate.status == WorkStatus.DONE:
        pair = [choices.plan_dev(shop, row, gate=number - 1) for row in (candidate, shop.store.incumbent())]
        measure(shop, *dict.fromkeys(pair))
        rollouts = (pair[0], pair[1])
    verdict = choices.judge_candidate(shop, number, rollouts)
    shop.progress.note(f"generation {number} ({candidate.lever}): {verdict.text}")


def open_sealed_test(shop: Workshop) -> None:
    """The sealed test, once: the first Scaffold, the best harness-only candidate and the winner."""
    rollouts = [choices.plan_test(shop, arm, row) for arm, row in choices.choose_arms(shop).items()]
    measure(shop, *dict.fromkeys(rollouts))


def announce(shop: Workshop, row: GenerationRow) -> None:
    """Say that a Generation is at hand."""
    shop.progress.generation(row.number, shop.settings.generations, row.lever, row.note)


def label(shop: Workshop, number: int, what: str) -> str:
    """A task run's name in the Prefect UI: task, generation, lever, what."""
    row = shop.store.generation(number)
    lever = row.lever if row is not None else Lever.FIRST
    return f"{shop.spec.name} gen {number} {lever}: {what}"
