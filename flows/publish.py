"""What a finished Run leaves for people to see: artifacts in the Prefect UI and the HTML report."""

from __future__ import annotations

import re

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.artifacts import decision_log_markdown, result_table
from flows.report import write_report
from flows.views import run_view
from flows.workshop import Workshop


def publish_result(shop: Workshop) -> None:
    """Write the report and the artifacts (result table, decision log) of a Run whose sealed test is scored."""
    view = run_view(shop.database, shop.run_id)
    write_report(view, shop.places)
    key = re.sub(r"[^a-z0-9]+", "-", shop.run_id.lower()).strip("-")
    create_table_artifact(table=result_table(view), key=f"result-{key}", description=f"{shop.run_id}: the sealed test")
    create_markdown_artifact(decision_log_markdown(view), key=f"decisions-{key}", description="What was tried and why")
