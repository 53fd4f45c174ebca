"""What a user should know though nothing failed: in the log, and on the node that runs."""

from __future__ import annotations

import logging
import sys

from comfy_execution.utils import get_executing_context

logger = logging.getLogger(__name__)


def show(text: str) -> None:
    """Puts a text on the node that is being executed, where there is one and a page to show it."""
    server = sys.modules.get("server")  # with a database and all of ComfyUI's routes; there before any node runs
    context = get_executing_context()
    if context is not None and server is not None and server.PromptServer.instance is not None:
        server.PromptServer.instance.send_progress_text(text, context.node_id)


def warn(text: str) -> None:
    logger.warning("%s", text)
    show(text)
