"""The one place that writes a Run's rows (model calls apart: `flows.state.calls`).

Every method is idempotent on its piece of work's key: asked twice, it finds what is there. So a step that was killed
is simply called again. Nothing here computes; records go in, records come out.
"""

from __future__ import annotations

from pydantic import JsonValue
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select

from agents.archive import Attempt, Estimate, Lever, Objective
from agents.decision import Decision
from flows.state.database import Database, StateError
from flows.state.rollout_rows import RolloutRows
from flows.state.tables import (
    AdapterRow,
    DecisionRow,
    GateVerdictRow,
    GenerationRow,
    RunRow,
    RunStatus,
    ScaffoldRow,
    SpendingRow,
    TestReadRow,
    TrainingStepRow,
    WeightUpdateRow,
    WorkStatus,
    now,
)


class Store(RolloutRows):
    """Reads and writes the rows of one Run."""

    # --- the run -----------------------------------------------------------------------------------------------

    def run(self) -> RunRow:
        """The Run's row.

        Raises:
            StateError: there is no such run.
        """
        with self.database.session() as session:
            row = session.get(RunRow, self.run_id)
        if row is None:
            raise StateError(f"there is no run '{self.run_id}'; `sia list` shows those there are")
        return row

    def set_status(self, status: RunStatus, *, owner: str | None = None, error: str | None = None) -> None:
        """Record where the Run stands and who works on it."""
        with self.database.session() as session:
            row = session.get_one(RunRow, self.run_id)
            row.status, row.owner, row.error = status, owner, error
            if status is RunStatus.FINISHED:
                row.finished_at = now()

    def set_flow_run(self, flow_run_id: str) -> None:
        """Remember which Prefect flow run works on it, so that a killed one can be marked as crashed."""
        with self.database.session() as session:
            session.get_one(RunRow, self.run_id).flow_run_id = flow_run_id

    def add_active_time(self, seconds: float) -> None:
        """Book working time; called at short intervals so that a kill loses little of it."""
        with self.database.session() as session:
            session.get_one(RunRow, self.run_id).active_s += seconds

    # --- scaffolds, adapters, generations ----------------------------------------------------------------------

    def save_scaffold(self, scaffold_id: str, kind: str, note: str) -> None:
        """Record a Scaffold whose folder is already in place."""
        with self.database.session() as session:
            if session.get(ScaffoldRow, scaffold_id) is None:
                session.add(ScaffoldRow(id=scaffold_id, kind=kind, note=note))

    def save_adapter(self, adapter_id: str, base_model: str, parent_id: str | None) -> None:
        """Record an Adapter whose folder is already in place."""
        with self.database.session() as session:
            if session.get(AdapterRow, adapter_id) is None:
                session.add(AdapterRow(id=adapter_id, base_model=base_model, parent_id=parent_id))

    def generations(self) -> list[GenerationRow]:
        """All Generations in order."""
        with self.database.session() as session:
            query = select(GenerationRow).where(GenerationRow.run_id == self.run_id)
            return list(session.exec(query.order_by(col(GenerationRow.number))))

    def generation(self, number: int) -> GenerationRow | None:
        """The Generation of that number, if it was begun."""
        with self.database.session() as session:
            return session.exec(
                select(GenerationRow).where(GenerationRow.run_id == self.run_id, GenerationRow.number == number)
            ).first()

    def begin_generation(
        self,
        number: int,
        lever: Lever,
        parent: int | None,
        *,
        scaffold_id: str | None = None,
        adapter_id: str | None = None,
        objective: str | None = None,
        note: str = "",
        recipe: JsonValue = None,
    ) -> GenerationRow:
        """Write a Generation's intent; it is DONE at once if nothing remains to be made."""
        with self.database.session() as session:
            row = _generation(session, self.run_id, number)
            if row is None:
                whole = scaffold_id is not None and lever is not Lever.WEIGHTS
                row = GenerationRow(
                    run_id=self.run_id,
                    number=number,
                    lever=lever,
                    parent=parent,
                    scaffold_id=scaffold_id,
                    adapter_id=adapter_id,
                    objective=objective,
                    note=note,
                    recipe=recipe,
                    status=WorkStatus.DONE if whole else WorkStatus.INTENDED,
                )
                session.add(row)
            return row

    def complete_generation(
        self,
        number: int,
        *,
        scaffold_id: str | None = None,
        adapter_id: str | None = None,
        status: WorkStatus = WorkStatus.DONE,
        note: str | None = None,
        recipe: JsonValue = None,
        accepted: bool | None = None,
    ) -> None:
        """Fill in what was made; FAILED for a candidate that could not be made (then the gate rejects it). Only the
        first Generation is accepted as it is completed; later ones wait for the gate."""
        with self.database.session() as session:
            row = _generation(session, self.run_id, number)
            assert row is not None, "a generation is begun before it is completed"
            row.scaffold_id = scaffold_id or row.scaffold_id
            row.adapter_id = adapter_id or row.adapter_id
            row.status = status
            row.note = note or row.note
            row.recipe = recipe or row.recipe
            row.accepted = accepted

    def incumbent(self) -> GenerationRow:
        """The last accepted Generation."""
        return [g for g in self.generations() if g.accepted][-1]

    # --- decisions, verdicts, weight updates, the sealed test, spending ----------------------------------------

    def decision(self, after_generation: int) -> DecisionRow | None:
        """The decision made after a Generation, if there is one."""
        with self.database.session() as session:
            return session.exec(
                select(DecisionRow).where(
                    DecisionRow.run_id == self.run_id, DecisionRow.after_generation == after_generation
                )
            ).first()

    def save_decision(
        self, after_generation: int, decision: Decision, scaffold_id: str | None, evidence: JsonValue
    ) -> DecisionRow:
        """Record a decision with the evidence it was made on; the first one recorded stands."""
        found = self.decision(after_generation)
        if found is not None:
            return found
        with self.database.session() as session:
            row = DecisionRow(
                run_id=self.run_id,
                after_generation=after_generation,
                lever=decision.lever,
                reasons=list(decision.reasons),
                scaffold_id=scaffold_id,
                note=decision.draft.note if decision.draft else "",
                recipe=decision.draft.recipe if decision.draft else None,
                settings=decision.settings.model_dump(mode="json") if decision.settings else None,
                evidence=evidence,
            )
            session.add(row)
        return row

    def verdict(self, gate: int) -> GateVerdictRow | None:
        """The verdict of a gate, if it has spoken."""
        with self.database.session() as session:
            return session.exec(
                select(GateVerdictRow).where(GateVerdictRow.run_id == self.run_id, GateVerdictRow.gate == gate)
            ).first()

    def verdicts(self) -> list[GateVerdictRow]:
        """All verdicts in order."""
        with self.database.session() as session:
            query = select(GateVerdictRow).where(GateVerdictRow.run_id == self.run_id)
            return list(session.exec(query.order_by(col(GateVerdictRow.gate))))

    def save_verdict(self, row: GateVerdictRow) -> None:
        """Record a verdict and what follows from it for the candidate, in one transaction."""
        with self.database.session() as session:
            known = select(GateVerdictRow).where(GateVerdictRow.run_id == self.run_id, GateVerdictRow.gate == row.gate)
            if session.exec(known).first() is None:
                session.add(row)
            generation = _generation(session, self.run_id, row.generation)
            assert generation is not None, "a generation is begun before it is judged"
            generation.accepted = row.accepted

    def begin_weight_update(
        self, generation: int, objective: Objective, settings: JsonValue, start_adapter_id: str | None
    ) -> WeightUpdateRow:
        """Write the intent of a WeightUpdate, or find it."""
        with self.database.session() as session:
            row = session.exec(
                select(WeightUpdateRow).where(
                    WeightUpdateRow.run_id == self.run_id, WeightUpdateRow.generation == generation
                )
            ).first()
            if row is None:
                row = WeightUpdateRow(
                    run_id=self.run_id,
                    generation=generation,
                    objective=objective,
                    settings=settings,
                    start_adapter_id=start_adapter_id,
                )
                session.add(row)
            return row

    def finish_weight_update(self, weight_update_id: int, status: WorkStatus, adapter_id: str | None) -> None:
        """Close a WeightUpdate."""
        with self.database.session() as session:
            row = session.get_one(WeightUpdateRow, weight_update_id)
            row.status, row.adapter_id = status, adapter_id

    def training_steps(self, weight_update_id: int) -> list[TrainingStepRow]:
        """Committed iterations in order."""
        with self.database.session() as session:
            query = select(TrainingStepRow).where(TrainingStepRow.weight_update_id == weight_update_id)
            return list(session.exec(query.order_by(col(TrainingStepRow.iteration))))

    def save_training_step(self, row: TrainingStepRow) -> None:
        """Commit an iteration; its checkpoint and adapter are already on disk."""
        with self.database.session() as session:
            session.add(row)

    def record_test_read(self, arm: str, generation: int, rollout_id: int) -> None:
        """Write that an arm reads the sealed test, before it does."""
        with self.database.session() as session:
            known = select(TestReadRow).where(TestReadRow.run_id == self.run_id, TestReadRow.arm == arm)
            if session.exec(known).first() is None:
                session.add(TestReadRow(run_id=self.run_id, arm=arm, generation=generation, rollout_id=rollout_id))

    def test_reads(self) -> list[TestReadRow]:
        """Recorded reads of the sealed test."""
        with self.database.session() as session:
            return list(session.exec(select(TestReadRow).where(TestReadRow.run_id == self.run_id)))

    def spend(self, generation: int, step: str, **amounts: float) -> None:
        """Book what a step cost; a step booked before is not booked twice."""
        with self.database.session() as session:
            known = set(
                session.exec(
                    select(SpendingRow.kind).where(SpendingRow.run_id == self.run_id, SpendingRow.step == step)
                )
            )
            for kind, amount in amounts.items():
                if kind not in known:
                    session.add(
                        SpendingRow(run_id=self.run_id, generation=generation, step=step, kind=kind, amount=amount)
                    )

    # --- the archive -------------------------------------------------------------------------------------------

    def attempt(self, row: GenerationRow, dev: Estimate | None) -> Attempt:
        """A Generation as the archive shows it to a Feedback-Agent."""
        return Attempt(
            generation=row.number,
            lever=Lever(row.lever),
            parent=row.parent,
            scaffold_id=row.scaffold_id or "",
            adapter_id=row.adapter_id,
            recipe=row.recipe if isinstance(row.recipe, dict) else None,
            dev=dev,
            accepted=row.accepted,
            objective=Objective(row.objective) if row.objective else None,
            note=row.note,
        )


def create_run(database: Database, row: RunRow) -> None:
    """Insert a Run.

    Raises:
        StateError: the name is taken.
    """
    try:
        with database.session() as session:
            session.add(row)
    except IntegrityError:  # the database is asked, since another process may be quicker than a look beforehand
        raise StateError(f"there is a run '{row.id}' already") from None


def find_run(database: Database, run_id: str) -> RunRow | None:
    """The Run of that name, if there is one."""
    with database.session() as session:
        return session.get(RunRow, run_id)


def run_names(database: Database) -> list[str]:
    """Names of all Runs."""
    with database.session() as session:
        return list(session.exec(select(RunRow.id).order_by(col(RunRow.created_at))))


def _generation(session: Session, run_id: str, number: int) -> GenerationRow | None:
    return session.exec(
        select(GenerationRow).where(GenerationRow.run_id == run_id, GenerationRow.number == number)
    ).first()
