"""Rows 40 to 59 of the acceptance list: models on disk, names, templates, scheduling, and what is around the API."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from acceptance_server import FRANCE, GREEDY, PARIS, TOOL, create, post, refused, rendered, upload, whole
from serving import Server, serving, workers_of

pytestmark = pytest.mark.e2e
CONFIG = (
    b'{"model_format":"gguf","model_family":"test","model_families":["test"],"model_type":"0","file_type":"unknown",'
    b'"architecture":"amd64","os":"linux"}\n'
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the demo model, on which a Go template goes before the weights' own."""
    with serving(tmp_path_factory.mktemp("library"), OLLAMA_GO_TEMPLATE="1") as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    """Its client."""
    with httpx.Client(base_url=server.url, timeout=60) as opened:
        yield opened


def manifest(server: Server, name: str, tag: str = "latest") -> Path:
    """Where the manifest of a model of Ollama's library is."""
    return server.root / "models/manifests/registry.ollama.ai/library" / name / tag


def layers(server: Server, name: str) -> dict[str, list[str]]:
    """Digests of a model's layers by their kind."""
    found: dict[str, list[str]] = {}
    for layer in json.loads(manifest(server, name).read_bytes())["layers"]:
        found.setdefault(layer["mediaType"].rpartition(".")[2], []).append(layer["digest"])
    return found


def sha256(text: bytes) -> str:
    """A blob's digest."""
    return f"sha256:{hashlib.sha256(text).hexdigest()}"


def delete(client: httpx.Client, **body: str) -> httpx.Response:
    """DELETE with a body."""
    return client.request("DELETE", "/api/delete", json=body)


@contextmanager
def registry_of(models: Path) -> Iterator[str]:
    """A registry that has the demo of a model directory, and nothing else."""

    class Registry(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            blob = self.path.startswith("/v2/library/demo/blobs/")
            found = models / "manifests/registry.ollama.ai/library/demo/latest"
            if blob:
                found = models / "blobs" / self.path.rpartition("/")[2].replace(":", "-")
            there = blob or self.path == "/v2/library/demo/manifests/latest"
            data = found.read_bytes() if there else b"{}"
            status = 200 if there else 404
            if (asked := self.headers.get("Range")) and blob:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                end = int(last) + 1 if last else len(data)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(data)}")
                data = data[int(first) : end]
            else:
                self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as registry:
        threading.Thread(target=registry.serve_forever).start()
        try:
            yield f"127.0.0.1:{registry.server_port}"
        finally:
            registry.shutdown()


def test_row_40_pull(server: Server, client: httpx.Client, tmp_path: Path) -> None:
    """Every step is told, and the manifest is the registry's to the byte; what is there is told too."""
    shutil.copytree(server.root / "models", tmp_path / "registry")
    with registry_of(tmp_path / "registry") as address, serving(tmp_path) as other:
        body = {"model": f"{address}/library/demo", "insecure": True}
        lines = [json.loads(line) for line in httpx.post(f"{other.url}/api/pull", json=body).text.splitlines()]
        assert lines[0] == {"status": "pulling manifest"}
        assert [line["status"] for line in lines[-3:]] == ["verifying sha256 digest", "writing manifest", "success"]
        assert all(line["status"] == f"pulling {line['digest'][7:19]}" for line in lines[1:-3])
        assert lines[-4]["completed"] == lines[-4]["total"]
        pulled = tmp_path / "models/manifests" / address / "library/demo/latest"
        assert pulled.read_bytes() == manifest(server, "demo").read_bytes()
        again = httpx.post(f"{other.url}/api/pull", json={**body, "stream": False})
        assert (again.text, again.headers["content-type"]) == ('{"status":"success"}', "application/json")


def test_row_41_pull_failures(client: httpx.Client, tmp_path: Path) -> None:
    """In the stream, after its first line, or as the status."""
    with registry_of(tmp_path) as address:
        body = {"model": f"{address}/library/nope", "insecure": True}
        lines = client.post("/api/pull", json=body).text.splitlines()
        text = "pull model manifest: file does not exist"
        assert [json.loads(line) for line in lines] == [{"status": "pulling manifest"}, {"error": text}]
        assert refused(client.post("/api/pull", json={**body, "stream": False})) == (500, text)
    assert refused(client.post("/api/pull", json={"model": ""})) == (400, "invalid model name")


def test_row_42_push(client: httpx.Client) -> None:
    """Refusals; the success needs a registry that takes uploads."""
    assert refused(client.post("/api/push", json={"name": ""})) == (400, "model is required")
    assert "error" in client.post("/api/push", json={"name": "me/nope"}).text.splitlines()[-1]


def test_row_43_copy(server: Server, client: httpx.Client) -> None:
    """The manifest, to the byte; refusals name the field."""

    def copy(source: str, destination: str) -> httpx.Response:
        return client.post("/api/copy", json={"source": source, "destination": destination})

    for _ in range(2):
        got = copy("demo", "copied")
        assert (got.status_code, got.content) == (200, b"")
    assert manifest(server, "copied").read_bytes() == manifest(server, "demo").read_bytes()
    assert copy("DEMO", "Copied").status_code == 200
    assert not manifest(server, "Copied").exists()
    assert copy("demo", "demo").status_code == 200
    assert refused(copy("", "x")) == (400, 'source "" is invalid')
    assert refused(copy("demo", "a/b/c/d")) == (400, 'destination "a/b/c/d" is invalid')
    assert refused(copy("nope", "x")) == (404, 'model "nope" not found')


def test_row_44_delete(server: Server, client: httpx.Client) -> None:
    """What others need stays, what nobody needs goes, directories too."""
    create(client, "gone", **{"from": "demo", "system": "Nobody else says this."})
    system = server.root / "models/blobs" / layers(server, "gone")["system"][0].replace(":", "-")
    assert system.exists()
    got = delete(client, name="gone")
    assert (got.status_code, got.content) == (200, b"")
    assert not system.exists()
    assert not manifest(server, "gone").parent.exists()
    assert whole(client, "chat", messages=FRANCE)["message"]["content"] == PARIS
    assert refused(delete(client, model="gone")) == (404, "model 'gone' not found")
    assert refused(delete(client, model="")) == (400, "model is required")
    assert refused(delete(client, model="a/b/c/d")) == (400, 'name "a/b/c/d" is invalid')


def test_row_45_blobs(client: httpx.Client) -> None:
    """There, not there, and not what was promised."""
    data = b"a blob of nobody"
    digest = sha256(data)
    path = f"/api/blobs/{digest}"
    assert client.head(path).status_code == 404
    assert client.post(path, content=iter([data[:5], data[5:]])).status_code == 201
    assert client.post(path, content=b"ignored").status_code == 200
    got = client.head(path)
    assert (got.status_code, got.content) == (200, b"")
    assert refused(client.post("/api/blobs/nope", content=b"x")) == (400, "invalid digest format")
    other = "sha256:" + 64 * "0"
    text = f'digest mismatch, expected "{other}", got "{sha256(b"x")}"'
    assert refused(client.post(f"/api/blobs/{other}", content=b"x")) == (400, text)


def test_row_46_create_from(server: Server, client: httpx.Client) -> None:
    """Weights are shared, texts replaced, licences appended, parameters merged; digests are Ollama's."""
    messages = [
        {"role": "assistant", "content": "What is my purpose?"},
        {"role": "user", "content": "You run tests."},
        {"role": "assistant", "content": "Oh, my god."},
    ]
    parameters = {"temperature": 1, "top_k": 10, "stop": ["USER:", "ASSISTANT:"]}
    body: dict[str, Any] = {
        "from": "demo",
        "system": "Say bye!",
        "parameters": parameters,
        "messages": messages,
        "license": "one",
    }
    said = create(client, "first", **body)
    assert said[-2:] == ["writing manifest", "success"]
    assert any(step.startswith("using existing layer sha256:") for step in said)
    assert any(step.startswith("creating new layer sha256:") for step in said)
    made = layers(server, "first")
    assert made["model"] == layers(server, "demo")["model"]
    assert made["system"] == ["sha256:4c5f51faac758fecaff8db42f0b7382891a4d0c0bb885f7b86be88c814a7cc86"]
    assert made["params"] == ["sha256:1d0ad71299d48c2fb7ae2b98e683643e771f8a5b72be34942af90d97a91c1e37"]
    assert made["messages"] == ["sha256:298baeaf6928a60cf666d88d64a1ba606feb43a2865687c39e40652e407bffc4"]
    more: dict[str, Any] = {
        "parameters": {"stop": ["X"], "top_p": 0.5},
        "license": ["two"],
        "template": "T {{ .Prompt }}",
    }
    create(client, "second", **{"from": "first", **more})
    merged = layers(server, "second")
    assert merged["license"] == [sha256(b"one"), sha256(b"two")]
    assert merged["params"] == [sha256(b'{"stop":["X"],"temperature":1,"top_k":10,"top_p":0.5}\n')]
    assert merged["system"] == made["system"]
    assert merged["template"] == [sha256(b"T {{ .Prompt }}")]
    create(client, "second", **{"from": "second", "system": "New", "messages": messages[1:2]})
    assert layers(server, "second")["system"] == [sha256(b"New")]
    assert layers(server, "second")["messages"] == [sha256(b'[{"role":"user","content":"You run tests."}]\n')]


def test_row_47_create_files(server: Server, client: httpx.Client) -> None:
    """A GGUF that was uploaded answers; refusals in Ollama's words."""
    demo = server.root / "models/blobs" / layers(server, "demo")["model"][0].replace(":", "-")
    digest = upload(client, demo.read_bytes())
    assert "parsing GGUF" in create(client, "uploaded", files={"demo.gguf": digest})
    answer = whole(client, "chat", model="uploaded", messages=FRANCE)
    assert answer["message"]["content"] == PARIS
    adapter = upload(client, (Path(__file__).parent / "demo-lora.gguf").read_bytes())
    create(client, "adapted", **{"from": "demo", "adapters": {"lora.gguf": adapter}})
    assert layers(server, "adapted")["adapter"] == [adapter]
    assert whole(client, "chat", model="adapted", messages=FRANCE)["done"]
    refusals: list[tuple[dict[str, Any], int, str]] = [
        ({}, 400, "neither 'from' or 'files' was specified"),
        ({"files": {"/x.gguf": digest}}, 400, "file path must be relative"),
        ({"files": {"../x.gguf": digest}}, 400, "file path must be relative"),
        ({"files": {"x.gguf": ""}}, 400, "invalid digest format"),
        ({"files": {"x.bin": upload(client, b"nothing known")}}, 400, "unknown type"),
        ({"from": "a/b/c/d"}, 400, "invalid model name"),
        ({"from": "demo", "quantize": "q4_K_M"}, 500, "quantization is only supported for F16, BF16 and F32 models"),
        (
            {"from": "demo", "adapters": {"a.gguf": adapter, "b.gguf": adapter}},
            400,
            "only one adapter is currently supported",
        ),
    ]
    for body, status, text in refusals:
        assert refused(post(client, "create", model="x", stream=False, **body)) == (status, text)


def test_row_48_create_further(server: Server, client: httpx.Client, tmp_path: Path) -> None:
    """What is missing is pulled; one object where no stream is asked for; broken templates are told."""
    got = post(client, "create", model="onepiece", stream=False, **{"from": "demo", "system": "x"})
    assert (got.text, got.headers["content-type"]) == ('{"status":"success"}', "application/json")
    body = {"from": "demo", "template": "{{ .Prompt", "stream": False}
    status, text = refused(post(client, "create", model="broken", **body))
    assert status == 400
    assert text.startswith("template error: template: :1:")
    with registry_of(tmp_path) as address:
        lines = post(client, "create", model="x", **{"from": f"http://{address}/library/nope"}).text.splitlines()
    assert json.loads(lines[0]) == {"status": "pulling manifest"}
    assert "error" in json.loads(lines[-1])


def test_row_49_create_config(server: Server, client: httpx.Client) -> None:
    """Renderer, parser and required version are the base's where nothing else is said."""
    create(client, "base", **{"from": "demo", "requires": "0.14.0", "parser": "passthrough"})
    create(client, "heir", **{"from": "base", "system": "x"})
    digest = json.loads(manifest(server, "heir").read_bytes())["config"]["digest"]
    config = json.loads((server.root / "models/blobs" / digest.replace(":", "-")).read_bytes())
    assert (config["requires"], config["parser"]) == ("0.14.0", "passthrough")
    assert config["model_family"] == "llama"
    assert post(client, "show", model="heir").json()["requires"] == "0.14.0"


def test_row_50_names(server: Server, client: httpx.Client) -> None:
    """Any case of letters, the shortest form with a tag, and suffixes for here and elsewhere."""
    create(client, "Mixed", **{"from": "demo", "system": "1"})
    create(client, "mixed", **{"from": "demo", "system": "2"})
    create(client, "me/own", **{"from": "demo"})
    names = [model["name"] for model in client.get("/api/tags").json()["models"]]
    assert [name for name in names if name.lower() == "mixed:latest"] == ["Mixed:latest"]
    assert "me/own:latest" in names
    assert post(client, "show", model=" MIXED:Latest ").json()["system"] == "2"
    assert post(client, "show", model="mixed:local").status_code == 200
    got = refused(post(client, "show", model="mixed:7b-cloud"))
    assert got == (403, "ollama cloud is disabled: remote model details are unavailable")
    for bad in ("m:", "/n/m", "-m", "a.b/m", "hf.co/R", "a/b/c/d", "m@sha256:x", "h/na:me/m:t", "ümlaut"):
        assert refused(post(client, "generate", model=bad, prompt="x")) == (400, "invalid model name"), bad
    assert refused(post(client, "generate", model="my-cloud-model", prompt="x"))[0] == 404


def test_row_51_store(server: Server, tmp_path: Path) -> None:
    """A directory in Ollama's layout is read, young blobs stay, old ones that nobody needs go."""
    assert sha256(CONFIG) == "sha256:99759ad5b91e723db0393d698ffbb448b1b7df5ff6377a108c49254583b1bc8c"
    shutil.copytree(server.root / "models", tmp_path / "models")
    blobs = tmp_path / "models/blobs"
    young, old = blobs / sha256(b"young").replace(":", "-"), blobs / sha256(b"old").replace(":", "-")
    young.write_bytes(b"young")
    old.write_bytes(b"old")
    os.utime(old, (0, 0))
    with serving(tmp_path) as other:
        assert "demo:latest" in httpx.get(f"{other.url}/api/tags").text
        assert (young.exists(), old.exists()) == (True, False)


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("a  {{- .Prompt -}}  b", "apb"),
        (
            "{{ range $i, $m := .Messages }}{{ $i }}{{ .Role }}={{ .Content }};{{ else }}none{{ end }}",
            "0system=s;1user=p;",
        ),
        ("{{ range .Messages }}{{ .Role }}{{ break }}{{ end }}", "system"),
        ('{{ with .System }}<{{ . }}>{{ end }}{{ define "t" }}[{{ . }}]{{ end }}{{ template "t" .Prompt }}', "<s>[p]"),
        ('{{ if and .System (eq .Prompt "q" "p") }}yes{{ else }}no{{ end }} {{ len .Prompt }}', "yes 1"),
        ('{{ printf "%s-%q" .Prompt .System }} {{ .Missing }} {{ .Think }}', 'p-"s" <no value> false'),
    ],
)
def test_row_52_template_language(client: httpx.Client, template: str, prompt: str) -> None:
    """What a prompt comes to."""
    body = {"prompt": "p", "system": "s", "template": template + "{{ if false }}{{ .Response }}{{ end }}"}
    assert rendered(client, "generate", **body) == prompt


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ .Nope.X.Y }}", "nil pointer evaluating interface {}.X"),
        ("{{ range .Messages }}{{ .Zip }}{{ end }}", "can't evaluate field Zip in type"),
        ("{{ if eq .Prompt 1 }}x{{ end }}", "incompatible types for comparison"),
    ],
)
def test_row_52_template_errors(client: httpx.Client, template: str, text: str) -> None:
    """Go's own words, with a status that says whose fault a model's template is."""
    status, said = refused(post(client, "generate", prompt="p", template=template, stream=False))
    assert status == 500
    assert text in said


def test_row_53_template_modes(client: httpx.Client) -> None:
    """Turn by turn up to the answer, whose beginning can be given; equal roles in a row are one message."""
    template = "[INST] {{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}[/INST] {{ .Response }}</s>"
    create(client, "legacy", **{"from": "demo", "template": template})
    create(client, "bare", **{"from": "demo", "template": "Q: {{ .Prompt }}\n"})
    roles = ["system", "user", "assistant", "user", "assistant"]
    talk = [{"role": role, "content": content} for role, content in zip(roles, "SABCD", strict=True)]
    got = rendered(client, "chat", model="legacy", messages=talk[:4])
    assert got == "[INST] S\n\nA[/INST] B</s>[INST] C[/INST] "
    assert rendered(client, "chat", model="legacy", messages=talk).endswith("[INST] C[/INST] D")
    twice = [{"role": "user", "content": "A"}, {"role": "user", "content": "B"}]
    assert rendered(client, "chat", model="legacy", messages=twice) == "[INST] A\n\nB[/INST] "
    assert rendered(client, "chat", model="bare", messages=twice) == "Q: A\n\nB\n"


def test_row_54_scheduler(server: Server, client: httpx.Client) -> None:
    """A request's keep-alive stays until another comes; load options load the model anew."""

    def expires() -> str:
        return str(client.get("/api/ps").json()["models"][0]["expires_at"])

    post(client, "generate", keep_alive=-1)
    forever = expires()
    whole(client, "chat", messages=FRANCE)
    assert expires()[:3] == forever[:3] != "202"
    post(client, "generate", keep_alive=30)
    assert expires() < forever
    before = workers_of(server)
    post(client, "generate", options={"num_ctx": 2048})
    assert workers_of(server) == before
    post(client, "generate", options={"num_batch": 64})
    assert set(workers_of(server)) - set(before)
    whole(client, "chat", messages=FRANCE, keep_alive=0)


def test_row_55_environment(tmp_path: Path) -> None:
    """Values are read with quotes and spaces around them."""
    env = {"OLLAMA_CONTEXT_LENGTH": ' "512" ', "OLLAMA_KEEP_ALIVE": "'-1'", "OLLAMA_ORIGINS": "https://mine.example"}
    with serving(tmp_path, **env) as other, httpx.Client(base_url=other.url, timeout=60) as client:
        post(client, "generate")
        (model,) = client.get("/api/ps").json()["models"]
        assert model["context_length"] == 512
        assert model["expires_at"] > "2100"
        assert client.get("/", headers={"origin": "https://mine.example"}).status_code == 200


def test_row_56_cloud(client: httpx.Client) -> None:
    """As an Ollama whose cloud is disabled and to which nobody has signed in."""
    assert client.get("/api/status").text == '{"cloud":{"disabled":true,"source":"config"}}'
    assert refused(client.post("/api/me")) == (401, "unauthorized")
    assert refused(client.post("/api/signout")) == (401, "you are not currently signed in")
    assert refused(client.delete("/api/user/keys/abc")) == (401, "you are not currently signed in")
    for what in ("search", "fetch"):
        got = refused(client.post(f"/api/experimental/web_{what}", json={"query": "x", "url": "x"}))
        assert got == (403, f"ollama cloud is disabled: web {what} is unavailable")
    assert client.get("/api/experimental/model-recommendations").json() == {"recommendations": []}


def test_row_57_command_line(server: Server, tmp_path: Path) -> None:
    """From a Modelfile to an answer, and away again."""

    def headwater(*arguments: str) -> str:
        env = {**os.environ, "OLLAMA_HOST": server.url}
        command = [sys.executable, "-m", "gateway", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, (arguments, done.stderr)
        return done.stdout

    modelfile = tmp_path / "Modelfile"
    modelfile.write_text("FROM demo\nSYSTEM Be brief.\nPARAMETER temperature 0\n")
    headwater("create", "cli", "-f", str(modelfile))
    assert PARIS in headwater("run", "cli", FRANCE[0]["content"])
    assert "cli:latest" in headwater("ps")
    headwater("stop", "cli")
    headwater("cp", "cli", "cli2")
    assert "cli2:latest" in headwater("list")
    assert "Be brief." in headwater("show", "cli2")
    headwater("rm", "cli")
    headwater("rm", "cli2")
    assert "cli" not in headwater("list")


def test_row_58_ollama_python(server: Server) -> None:
    """The package's methods in a row."""
    with closing(ollama.Client(server.url)) as client:
        opened: Any = client
        options = dict(GREEDY)
        assert opened.chat("demo", messages=FRANCE, think=False, options=options).message.content == PARIS
        parts = opened.chat("demo", messages=FRANCE, think=False, options=options, stream=True)
        assert "".join(part.message.content for part in parts) == PARIS
        weather = [{"role": "user", "content": "What is the weather in Paris?"}]
        called = opened.chat("demo", messages=weather, tools=[TOOL], options=options)
        assert called.message.tool_calls[0].function.arguments == {"city": "Paris"}
        assert len(opened.embed("demo", input="a").embeddings) == 1
        assert opened.ps().models[0].model == "demo:latest"
        assert opened.create("package", from_="demo", system="S").status == "success"
        assert opened.show("package").modelinfo["general.architecture"] == "llama"
        assert opened.delete("package").status == "success"
        assert "package:latest" not in [model.model for model in opened.list().models]


def test_row_59_openai(client: httpx.Client) -> None:
    """Chat, completions, embeddings, models, and errors in their envelope."""
    body = {"model": "demo", "messages": FRANCE, "temperature": 0, "reasoning_effort": "none"}
    chat = client.post("/v1/chat/completions", json=body).json()
    assert (chat["object"], chat["choices"][0]["message"]["content"]) == ("chat.completion", PARIS)
    completion = client.post("/v1/completions", json={"model": "demo", "prompt": "x", "max_tokens": 2}).json()
    assert (completion["object"], completion["choices"][0]["finish_reason"]) == ("text_completion", "length")
    vectors = client.post("/v1/embeddings", json={"model": "demo", "input": ["a", "b"]}).json()
    assert [row["index"] for row in vectors["data"]] == [0, 1]
    models = client.get("/v1/models").json()
    assert models["object"] == "list"
    assert {"id", "object", "created", "owned_by"} <= set(models["data"][0])
    missing = client.post("/v1/chat/completions", json={**body, "model": "nope"})
    assert missing.status_code == 404
    assert set(missing.json()["error"]) >= {"message", "type", "param", "code"}
