"""`create`, `cp`, `rm` and the parts of `show`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from cli_server import SHOW, CLIServer, nobody_fixture, server_fixture  # noqa: F401 - fixtures
from typer.testing import CliRunner

from engines.store.modelfile import parse_modelfile
from gateway.cli.client import CommandFailed
from gateway.cli.main import app
from gateway.cli.sources import gather

SUCCESS = '{"status":"parsing GGUF"}\n{"status":"success"}\n'


def digest_of(data: bytes) -> str:
    """As the wire has it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def invoke(*arguments: str | Path) -> Any:
    """What a command does."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path: Path, server: CLIServer) -> Path:
    """A folder with a Modelfile and what it speaks of; the server takes everything."""
    (tmp_path / "w.gguf").write_bytes(b"weights")
    (tmp_path / "lora.gguf").write_bytes(b"lora")
    (tmp_path / "Modelfile").write_text(
        "FROM ./w.gguf\nADAPTER lora.gguf\nSYSTEM Be brief.\nTEMPLATE {{ .Prompt }}\nPARAMETER stop a\n"
        "PARAMETER stop b\nPARAMETER num_ctx 10\nPARAMETER low_vram 1\nMESSAGE user hi\nLICENSE x\nREQUIRES v0.1.0\n"
    )
    server.answers["/api/create"] = (SUCCESS, 200)
    for data in (b"weights", b"lora"):
        server.answers[f"/api/blobs/{digest_of(data)}"] = ("", 404)
    return tmp_path


def test_what_the_server_lacks_is_sent(server: CLIServer, folder: Path) -> None:
    """Whole, to the address that its digest makes; a refusal ends the command."""
    (folder / "Modelfile").write_text("FROM ./w.gguf")
    address = f"/api/blobs/{digest_of(b'weights')}"
    result = invoke("create", "mine", "-f", folder / "Modelfile")
    assert server.bodies(address) == [b"", b"weights"]
    assert (result.exit_code, server.bodies("/api/create")) == (1, [])


def test_the_request_of_a_modelfile(server: CLIServer, folder: Path) -> None:
    """Every instruction is in it, as Ollama's own command line has it."""
    for data in (b"weights", b"lora"):
        server.answers[f"/api/blobs/{digest_of(data)}"] = ("", 200)
    result = invoke("create", "mine", "--file", folder / "Modelfile", "--quantize", "q8_0")
    assert result.exit_code == 0, result.output
    assert "warning: parameter low_vram is deprecated" in result.output
    assert result.output.splitlines()[-2:] == ["parsing GGUF", "success"]
    assert server.bodies("/api/create") == [
        {
            "model": "mine",
            "quantize": "q8_0",
            "files": {"w.gguf": digest_of(b"weights")},
            "adapters": {"lora.gguf": digest_of(b"lora")},
            "system": "Be brief.",
            "template": "{{ .Prompt }}",
            "parameters": {"stop": ["a", "b"], "num_ctx": 10},
            "messages": [{"role": "user", "content": "hi"}],
            "license": ["x"],
            "requires": "0.1.0",
        }
    ]


def test_create_in_json(server: CLIServer, folder: Path) -> None:
    """One object a line, what is done here included."""
    (folder / "Modelfile").write_text("FROM llama3.2")
    lines = invoke("create", "mine", "-f", folder / "Modelfile", "--json").output.splitlines()
    assert [json.loads(line)["status"] for line in lines] == ["gathering model components", "parsing GGUF", "success"]
    assert server.bodies("/api/create") == [{"model": "mine", "from": "llama3.2"}]


def test_without_a_modelfile_the_folder_is_the_model(
    server: CLIServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Ollama; but one that was named must be there."""
    (folder / "Modelfile").unlink()
    (folder / "lora.gguf").unlink()
    server.answers[f"/api/blobs/{digest_of(b'weights')}"] = ("", 200)
    monkeypatch.chdir(folder)
    assert invoke("create", "mine").exit_code == 0
    assert server.bodies("/api/create") == [{"model": "mine", "files": {"w.gguf": digest_of(b"weights")}}]
    assert "there is no such file" in invoke("create", "mine", "-f", "Other").output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SYSTEM x", "no FROM line"),
        ("FROM a\nFOO x", '(line 2): command must be one of "from"'),
        ("FROM a\nPARAMETER foo 1", "unknown parameter 'foo'"),
        ("FROM a\nADAPTER nowhere.gguf", "ADAPTER nowhere.gguf: there is no such file"),
        ("FROM a\nREQUIRES x", "requires must be a valid semver"),
    ],
)
def test_a_bad_modelfile_is_told_in_ollamas_words(server: CLIServer, folder: Path, text: str, message: str) -> None:
    """And nothing is sent."""
    (folder / "Modelfile").write_text(text)
    result = invoke("create", "mine", "-f", folder / "Modelfile")
    assert message in result.output
    assert (result.exit_code, server.requests) == (1, [])


def test_a_refusal_on_the_way(server: CLIServer, folder: Path) -> None:
    """The last line of the server's answer is the error."""
    (folder / "Modelfile").write_text("FROM a")
    server.answers["/api/create"] = ('{"status":"x"}\n{"error":"no room"}\n', 200)
    result = invoke("create", "mine", "-f", folder / "Modelfile")
    assert (result.exit_code, "Error: no room" in result.output) == (1, True)


def test_folders_are_looked_through_as_ollama_does(tmp_path: Path) -> None:
    """Safetensors before GGUFs, their companions with them, and nothing that a link leads out to."""
    for name in ("model-1.safetensors", "x.gguf", "config.json", "tokenizer.model", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    sources = gather(parse_modelfile(b"FROM ."), tmp_path)
    assert sources.files["files"].keys() == {"model-1.safetensors", "config.json", "tokenizer.model"}
    (tmp_path / "model-1.safetensors").unlink()
    assert gather(parse_modelfile(b"FROM ."), tmp_path).files["files"].keys() == {"x.gguf"}
    (tmp_path / "x.gguf").unlink()
    with pytest.raises(CommandFailed, match="no Modelfile or safetensors files found"):
        gather(parse_modelfile(b"FROM ."), tmp_path)
    (tmp_path / "x.gguf").symlink_to("/etc/hostname")
    with pytest.raises(CommandFailed, match="insecure path"):
        gather(parse_modelfile(b"FROM ."), tmp_path)


def test_cp_and_rm(server: CLIServer) -> None:
    """Say what they did; rm unloads first and takes several."""
    server.answers["/api/copy"] = ("", 200)
    server.answers["/api/delete"] = ("", 200)
    assert invoke("cp", "a", "b").output == "copied 'a' to 'b'\n"
    assert server.bodies("/api/copy") == [{"source": "a", "destination": "b"}]
    assert invoke("rm", "a", "b").output == "deleted 'a'\ndeleted 'b'\n"
    assert [path for path, _ in server.requests[1:]] == ["/api/generate", "/api/delete"] * 2
    server.answers["/api/delete"] = ({"error": "model 'a' not found"}, 404)
    result = invoke("rm", "a")
    assert (result.exit_code, result.output) == (1, "Error: model 'a' not found\n")
    server.answers["/api/delete"] = ("", 200)
    assert json.loads(invoke("rm", "a", "--json").output) == {"deleted": "a"}


def test_show_can_show_one_part(server: CLIServer) -> None:
    """As it is, so that it can be written to a file."""
    server.answers["/api/show"] = ({**SHOW, "modelfile": "FROM x\n", "template": "{{ .Prompt }}"}, 200)
    assert invoke("show", "m", "--modelfile").output == "FROM x\n\n"
    assert invoke("show", "m", "--template").output == "{{ .Prompt }}\n"
    assert invoke("show", "m", "--system").output == "Be brief.\n"
    assert invoke("show", "m", "--system", "--license").exit_code == 1
