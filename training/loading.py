"""Opening a model folder: weights, tokenizer, and the few facts about them that the engine and the trainer need.

A model folder is what `training.base_model` writes, or any transformers folder of a causal language model that takes a
4-D attention mask (Llama and its kin do). Importing this module is cheap; torch and transformers come with the calls.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from agents.model import Message, ModelRequest, RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelFacts:
    """`context`: the most tokens of prompt and completion together. `end_ids`: tokens that end a completion."""

    context: int
    end_ids: frozenset[int]


def read_facts(model_dir: Path) -> ModelFacts:
    """Read `config.json`.

    Raises:
        FileNotFoundError: not a model folder.
    """
    config = json.loads((model_dir / "config.json").read_text())
    ends = config["eos_token_id"]
    return ModelFacts(
        context=int(config["max_position_embeddings"]),
        end_ids=frozenset(ends if isinstance(ends, list) else [ends]),
    )


def load_model(model_dir: Path, device: str) -> PreTrainedModel:
    """The weights in fp32, in evaluation mode. On a CPU without matrix units fp32 beats bf16 several times over."""
    import warnings

    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    # PEFT still reads a property that transformers has renamed, and looks for the base model under the name that an
    # adapter gives; nobody at a terminal can do anything about either.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Could not find a config file in", category=UserWarning)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa")
    return model.to(device).eval()


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer with its chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, request: ModelRequest) -> tuple[int, ...]:
    """The token ids a request starts from.

    A raw prompt is tokenised as it stands. Chat messages go through the model's template with an opened assistant turn;
    a last assistant message is a prefill: the template is cut right behind its text, and sampling goes on from there.

    Raises:
        RequestError: neither or both of messages and prompt, an empty one, or roles that the template refuses.
    """
    if (request.prompt is None) == (not request.messages):
        raise RequestError("a call needs either messages or a prompt")
    if request.prompt is not None:
        ids = tokenizer(request.prompt).input_ids
    else:
        # The template already writes the special tokens, so the tokenizer must not add its own again.
        ids = tokenizer(_render(tokenizer, request.messages), add_special_tokens=False).input_ids
    if not ids:
        raise RequestError("the prompt is empty")
    return tuple(ids)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    from jinja2 import TemplateError

    roles = {message.role for message in messages}
    if not roles <= {"system", "user", "assistant"}:
        raise RequestError(f"unknown role among {sorted(roles)}: use system, user and assistant")
    turns = [{"role": message.role, "content": message.content} for message in messages]
    prefill = messages[-1].role == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=not prefill, continue_final_message=prefill
        )
    except (TemplateError, ValueError) as error:
        raise RequestError(f"the chat template refused these messages: {error}") from error
    return str(text)
