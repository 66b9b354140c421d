"""The Prefect side of a Run: calling the flow, and closing what a killed process left open."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
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


def remember_flow_run(shop: Workshop) -> None:
    """Record which flow run works on the Run."""
    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None:
        shop.store.set_flow_run(str(context.flow_run.id))


def run_flow(shop: Workshop) -> None:
    """Call the flow in this thread; Ctrl-C first ends the sandboxes, so that nothing waits for them."""
    from flows.improve import improve

    logging.getLogger("prefect").setLevel(logging.CRITICAL)
    if threading.current_thread() is not threading.main_thread():
        improve(shop.run_id)
        return
    previous = signal.getsignal(signal.SIGINT)

    def interrupt(number: int, frame: FrameType | None) -> None:
        shop.stop()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        improve(shop.run_id)
    finally:
        signal.signal(signal.SIGINT, previous)
