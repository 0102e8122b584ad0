from __future__ import annotations

import json

import pytest
from cli_server import PS, SHOW, TAGS, CLIServer, nobody_fixture, server_fixture  # noqa: F401 - fixtures
from typer.testing import CliRunner

from gateway.cli.main import app
from gateway.cli.models import complete_model


def test_list_has_ollamas_columns(server: CLIServer) -> None:
    """Name, short digest, size and age stand in one line each."""
    result = CliRunner().invoke(app, ["list"])
    heading, row = result.output.splitlines()
    assert heading.split() == ["NAME", "ID", "SIZE", "MODIFIED"]
    assert row.split()[:4] == ["llama3.2:latest", "a80c4f17acd5", "2.0", "GB"]
    assert result.exit_code == 0


def test_ls_is_list(server: CLIServer) -> None:
    """The short name does the same."""
    assert CliRunner().invoke(app, ["ls"]).output == CliRunner().invoke(app, ["list"]).output


def test_empty_list_is_only_headings(server: CLIServer) -> None:
    """No models is no error."""
    server.answers["/api/tags"] = ({"models": []}, 200)
    assert CliRunner().invoke(app, ["list"]).output.split() == ["NAME", "ID", "SIZE", "MODIFIED"]


def test_ps_tells_where_models_lie_and_how_long(server: CLIServer) -> None:
    """The split between CPU and GPU, the context and `Forever` are shown."""
    heading, row = CliRunner().invoke(app, ["ps"]).output.splitlines()
    assert heading.split() == ["NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL"]
    assert row.split() == ["llama3.2:latest", "a80c4f17acd5", "4", "GB", "25%/75%", "CPU/GPU", "4096", "Forever"]


def test_ps_tells_how_far_a_load_is(server: CLIServer) -> None:
    """In the place of when it goes."""
    server.answers["/api/ps"] = ({"models": [{**PS["models"][0], "load_progress": 0.423}]}, 200)
    assert CliRunner().invoke(app, ["ps"]).output.splitlines()[1].endswith("loading 42%")


@pytest.mark.parametrize(
    ("command", "answer"), [(["list"], TAGS), (["ps"], PS), (["show", "llama3.2"], SHOW)], ids=["list", "ps", "show"]
)
def test_json_is_what_the_server_said(server: CLIServer, command: list[str], answer: object) -> None:
    """Programs get everything, unchanged."""
    assert json.loads(CliRunner().invoke(app, [*command, "--json"]).output) == answer


def test_show_has_ollamas_sections(server: CLIServer) -> None:
    """What a model is, can do, is set to and may be used for."""
    result = CliRunner().invoke(app, ["show", "llama3.2"])
    assert result.output == (
        "  Model\n"
        "    architecture        llama\n"
        "    parameters          3.2B\n"
        "    context length      131072\n"
        "    embedding length    3072\n"
        "    quantization        Q4_K_M\n"
        "\n"
        "  Capabilities\n"
        "    completion\n"
        "    tools\n"
        "\n"
        "  Parameters\n"
        '    stop           "<|eot_id|>"\n'
        "    temperature    0.7\n"
        "\n"
        "  System\n"
        "    Be brief.\n"
        "\n"
        "  License\n"
        "    LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n"
        "    Version Release Date: September 25, 2024\n"
        "    ...\n"
        "\n"
    )
    assert server.bodies("/api/show") == [{"model": "llama3.2"}]


def test_show_of_a_bare_model_needs_nothing_but_model_info(server: CLIServer) -> None:
    """Every optional part of the answer may be absent."""
    server.answers["/api/show"] = ({"model_info": {}}, 200)
    result = CliRunner().invoke(app, ["show", "m"])
    assert (result.exit_code, result.output) == (0, "")


def test_stop_unloads(server: CLIServer) -> None:
    """A generate request without a prompt and with no keep-alive is what unloads."""
    assert CliRunner().invoke(app, ["stop", "llama3.2"]).exit_code == 0
    [body] = server.bodies("/api/generate")
    assert (body["model"], body["prompt"], body["keep_alive"]) == ("llama3.2", "", 0)


def test_unknown_model_is_told_in_the_servers_words(server: CLIServer) -> None:
    """The error text goes to stderr and the exit code is 1."""
    server.answers["/api/show"] = ({"error": "model 'nope:latest' not found"}, 404)
    result = CliRunner().invoke(app, ["show", "nope"])
    assert result.exit_code == 1
    assert result.stderr == "Error: model 'nope:latest' not found\n"
    assert result.stdout == ""


def test_terminal_sequences_in_a_name_are_disarmed(server: CLIServer) -> None:
    """A name cannot colour, move or clear anything, and markup in it is only text."""
    model = TAGS["models"][0] | {"name": "\x1b[2Jevil\n[bold]x[/bold]:latest"}
    server.answers["/api/tags"] = ({"models": [model]}, 200)
    row = CliRunner().invoke(app, ["list"]).output.splitlines()[1]
    assert row.startswith("\N{REPLACEMENT CHARACTER}[2Jevil [bold]x[/bold]:latest ")


def test_long_rows_stay_whole_in_a_pipe(server: CLIServer) -> None:
    """What is not a terminal gets one row a line, without cuts."""
    name = "registry.example/" + "x" * 200 + ":latest"
    server.answers["/api/tags"] = ({"models": [TAGS["models"][0] | {"name": name}]}, 200)
    assert CliRunner().invoke(app, ["list"]).output.splitlines()[1].split()[0] == name


def test_completion_offers_installed_models(server: CLIServer) -> None:
    """The shell is offered what begins with what was typed."""
    assert complete_model("lla") == ["llama3.2:latest"]
    assert complete_model("x") == []


def test_completion_without_a_server_is_silent(nobody: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is offered and nothing is printed into the command line being typed."""
    assert complete_model("") == []
    assert capfd.readouterr() == ("", "")
