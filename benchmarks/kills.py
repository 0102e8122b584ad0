"""Is the store whole after SIGKILL at any instant? `python -m benchmarks.kills` kills a busy writer fifty times.

The writer is a process that makes, replaces, copies and deletes models and uploads blobs in a loop, with the server's
own code. Each model is of one version that its system text, its parameters and its licence all name. After each kill
every model must be wholly of one version, every visible blob must be what its name says, and the next writer goes on
with the same store; at the end what the kills left behind must be found and deleted.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

from engines.errors import ModelNotFound
from engines.library import CreateRequest
from engines.store.blob_writer import BlobWriter
from engines.store.blobs import blob_path
from engines.store.catalog import Catalog
from engines.store.create import Creator
from engines.store.manifests import read_manifest, walk
from engines.store.names import parse_name
from engines.store.writer import StoreWriter

NAMES = ("alpha", "beta", "ns/gamma:tag")
BASE = "base"
UPLOAD_BYTES = 2 << 20
LONGEST_S = 0.4


class StoreBroken(AssertionError):
    """The store is in a state that nobody may ever see."""


def churn(models: Path, seed: int) -> None:
    """Change the store for ever. Says so on standard output once it begins."""
    writer, draw = StoreWriter(models), random.Random(seed)
    creator = Creator(writer, rewrite=_never, check_template=lambda text: None)
    if not (models / "manifests").exists():
        _make_base(writer, creator)
    sys.stdout.write("busy\n")
    sys.stdout.flush()
    for version in itertools.count(seed * 1_000_000):
        name, other = draw.sample(NAMES, 2)
        try:
            match draw.randrange(4):
                case 0 | 1:
                    creator.run(_version(name, version), lambda progress: None)
                case 2:
                    writer.copy(parse_name(name), parse_name(other))
                case 3:
                    writer.delete(parse_name(name))
        except ModelNotFound:
            _upload(models, draw)


def check(models: Path) -> int:
    """How many models there are. Raises StoreBroken."""
    for path in (models / "blobs").iterdir():
        if not path.name.startswith(".") and path.name != f"sha256-{hashlib.sha256(path.read_bytes()).hexdigest()}":
            raise StoreBroken(f"{path.name} is visible and has other bytes")
    names = list(walk(models))
    for name in names:
        manifest, _ = read_manifest(models, name)
        for layer in (manifest.config, *manifest.layers):
            if not blob_path(models, layer.digest).is_file():
                raise StoreBroken(f"{name.display} has no {layer.kind}")
            if blob_path(models, layer.digest).stat().st_size != layer.size:
                raise StoreBroken(f"{name.display} has {layer.kind} of another size")
        card = Catalog(models).find(name.full)
        said = {card.system, *card.licenses, str(card.parameters.get("seed", ""))}
        if name.model != BASE and len(said) != 1:
            raise StoreBroken(f"{name.display} is of versions {said}")
    if not any(name.model == BASE for name in names):
        raise StoreBroken("the model that nobody touches is gone")
    return len(names)


def kill_repeatedly(models: Path, num_kills: int, seed: int = 0) -> int:
    """Kill a writer so many times and look at the store each time; how many files the kills had left behind.

    Raises StoreBroken.
    """
    draw = random.Random(seed)
    for number in range(num_kills):
        writer = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.kills", "--churn", str(models), "--seed", str(number)],
            stdout=subprocess.PIPE,
        )
        assert writer.stdout is not None
        try:
            if writer.stdout.readline() != b"busy\n":
                raise StoreBroken("the next writer cannot go on with the store")
            time.sleep(draw.uniform(0, LONGEST_S))
        finally:
            os.kill(writer.pid, signal.SIGKILL)
            writer.communicate()
        check(models)
    num_left = StoreWriter(models).tidy(grace_s=0)
    check(models)
    used = {digest for name in walk(models) for digest in read_manifest(models, name)[0].digests}
    if {path.name.replace("-", ":") for path in (models / "blobs").iterdir()} != used:
        raise StoreBroken("files are left that no model needs")
    return num_left


def _make_base(writer: StoreWriter, creator: Creator) -> None:
    with BlobWriter(writer.models) as blob:
        blob.write((files("engines.store") / "demo" / "demo.gguf").read_bytes())
        blob.publish()
    creator.run(CreateRequest(name=BASE, files={"base.gguf": blob.digest}), lambda progress: None)


def _version(name: str, version: int) -> CreateRequest:
    text = str(version)
    return CreateRequest(name=name, base=BASE, system=text, licenses=(text,), parameters={"seed": version})


def _upload(models: Path, draw: random.Random) -> None:
    """A blob that comes in pieces and that no model names."""
    with BlobWriter(models) as blob:
        for _ in range(8):
            blob.write(struct.pack("<Q", draw.getrandbits(64)) * (UPLOAD_BYTES // 64))
        blob.publish()


def _never(*_: object) -> None:
    raise AssertionError("nothing is quantized here")


def main() -> None:
    """`--churn DIR` is the writer's own side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--churn", type=Path)
    arguments = parser.parse_args()
    if arguments.churn:
        churn(arguments.churn, arguments.seed)
        return
    root = Path(tempfile.mkdtemp(prefix="headwater-kills-"))
    try:
        num_left = kill_repeatedly(root / "models", arguments.kills, arguments.seed)
        print(f"{arguments.kills} kills, the store was whole after each; {num_left} files were left and deleted")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
