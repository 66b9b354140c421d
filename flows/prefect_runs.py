"""The Prefect side of a Run: calling the flow, and closing what a killed process left open."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from flows.workshop import Workshop


def mark_crashed(flow_run_id: str) -> None:
    """A flow run whose process was killed stays RUNNING in Prefect for ever: say there that it crashed."""
    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(UUID(flow_run_id)).state
        except ObjectNotFound:
            return
        if state is not None and not state.is_final():
            message = "its process ended without a word; the run goes on in a new flow run"
            client.set_flow_run_state(UUID(flow_run_id), Crashed(message=message), force=True)


def enter_flow_run(shop: Workshop) -> None:
    """Called by the flow as it begins: record which flow run works on the Run, and take SIGTERM back from Prefect,
    whose own handler would wait for the running shards."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupter(shop))
    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None:
        shop.store.set_flow_run(str(context.flow_run.id))


def run_flow(shop: Workshop) -> None:
    """Call the flow in this thread; Ctrl-C first ends the sandboxes, so that nothing waits for them."""
    from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

    from flows.improve import improve as improve_flow

    if os.environ.get("SIA_DEBUG") != "1":
        # What its event client retries while the server is away is no news to the person at the terminal.
        logging.getLogger("prefect._internal").setLevel(logging.CRITICAL)

    runner: TaskRunner[Any] = ThreadPoolTaskRunner(max_workers=shop.settings.parallel_shards)
    improve = improve_flow.with_options(task_runner=runner)
    if threading.current_thread() is not threading.main_thread():
        improve(shop.run_id)
        return
    previous = signal.signal(signal.SIGINT, _interrupter(shop))
    try:
        improve(shop.run_id)
    finally:
        signal.signal(signal.SIGINT, previous)


def _interrupter(shop: Workshop) -> Callable[[int, FrameType | None], None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        shop.stop()
        raise KeyboardInterrupt

    return interrupt
