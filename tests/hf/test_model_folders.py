"""Models come from folders that are there, bring no code, and are those of the run."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch

from tiny_models import save_tiny

pytest.importorskip("rich", reason="needs the extra [cli]")
pytest.importorskip("transformers", reason="needs the extra [hf]")

from dilated_attention_pytorch.cli.main import main
from dilated_attention_pytorch.hf.job import folder_digest
from dilated_attention_pytorch.hf.model_folder import load_model, load_tokenizer
from dilated_attention_pytorch.train.checkpoint import load_checkpoint, save_checkpoint

DISTILL = ["--windows", "2", "--seq-len", "64", "--block-size", "16", "--base-sparsity", "0.5",
           "--validation-windows", "1"]  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network."""

    def refuse(*args: object, **options: object) -> None:
        pytest.fail("asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def own(model: Path, tmp_path: Path) -> Path:
    shutil.copytree(model, tmp_path / "base")
    return tmp_path / "base"


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    assert main([str(x) for x in arguments]) == code
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["gpt2", "somebody/a-model", "./none", "/none", "~", ""])
def test_a_name_is_never_looked_for_elsewhere(name: str, tmp_path: Path) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"no folder|no tokenizer|cannot load"):
            load(name or tmp_path / "none")
        with pytest.raises(ValueError, match=r"no folder|no tokenizer|cannot load"):
            load(tmp_path)


@pytest.mark.parametrize(
    ("file", "field"),
    [("config.json", "AutoModelForCausalLM"), ("config.json", "AutoConfig"),
     ("tokenizer_config.json", "AutoTokenizer")],
)  # fmt: skip
@pytest.mark.parametrize("known", [True, False])
def test_code_that_a_folder_brings_is_refused(
    own: Path, tmp_path: Path, file: str, field: str, known: bool
) -> None:
    about = json.loads((own / file).read_text())
    about["auto_map"] = {field: "evil.Evil"}
    if not known and file == "config.json":
        about["model_type"] = "evil"
    (own / file).write_text(json.dumps(about))
    (own / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match="auto_map"):
            load(own)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"[" * 100_000, b"null", b'{"a"'])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_damaged_settings_are_named(own: Path, file: str, content: bytes) -> None:
    (own / file).write_bytes(content)
    with pytest.raises(ValueError, match=file):
        load_model(own)


def test_a_digest_changes_with_every_weight(own: Path) -> None:
    before = folder_digest(own)
    (own / "README.md").write_text("nothing that matters")
    assert folder_digest(own) == before
    path = own / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert folder_digest(own) != before
    with pytest.raises(ValueError, match="no folder"):
        folder_digest(own / "none")


def test_a_resumed_run_notices_another_model_and_another_maker(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("".join(f"line {n}, as every line here.\n" for n in range(100)))
    files = ["--model", str(own), "--text", str(text)]
    assert main(["distill", *files, "--out", str(out), *DISTILL]) == 0
    resume = ["distill", "--resume", "--out", out]
    assert main([str(x) for x in resume]) == 0
    assert main([*map(str, resume), *files]) == 0
    assert "model is" in refused(capsys, 1, *resume, "--model", tmp_path / "other")
    # Somebody else's: every file must be named, and is not looked at before.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
    own.rename(tmp_path / "away")
    error = refused(capsys, 1, *resume)
    assert f"{out} was not made by this account" in error
    assert error.endswith("Name them: --model --text.")
    assert "--text" in refused(capsys, 1, *resume, "--model", own)
    assert "--text" in refused(capsys, 1, "diagnose", out, "--model", tmp_path / "away")
    (tmp_path / "away").rename(own)
    assert main([*map(str, resume), *files]) == 0
    # Another model in the same place.
    weights = own / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    name = next(x for x in tensors if "mlp" in x)
    tensors[name] = tensors[name] + torch.ones(1)
    save_file(tensors, weights, metadata={"format": "pt"})
    error = refused(capsys, 1, *resume, *files)
    assert "the model has changed since the checkpoint of step 2" in error
    # Nor does a checkpoint pass that says nothing of the model.
    path = out / "checkpoints" / "step-00000002.pt"
    state = load_checkpoint(path)
    del state["inputs"]
    own_fields = {"format", "version", "step"}
    save_checkpoint(path.parent, 2, {k: v for k, v in state.items() if k not in own_fields})
    assert "its digest was none, and is now" in refused(capsys, 1, *resume, *files)
    shutil.rmtree(own)
    assert "no folder" in refused(capsys, 1, *resume, *files)
