"""The demo model, put into an empty store once, so that the first request works offline.

A marker file lists the directories that have been seeded, one path a line, so a demo that was deleted stays deleted.
Killed at any instant, or run by two servers at once, it ends well the next time: blobs and manifest are written
atomically and always with the same bytes, the manifest after its blobs, and the marker last.
"""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from engines.store.blobs import StoreNotWritable, blob_path, write_blob
from engines.store.gguf import read_header
from engines.store.gojson import encode_json
from engines.store.manifests import (
    CONFIG_TYPE,
    LAYER_TYPE,
    Layer,
    Manifest,
    ModelConfig,
    manifest_path,
    walk,
    write_manifest,
)
from engines.store.names import parse_name

DEMO = parse_name("demo")


def seed_demo(models: Path, marker: Path) -> bool:
    """Write the demo as `demo:latest` if `models` holds no model and was never seeded; whether it did so now.

    Raises:
        StoreNotWritable: the models directory or the marker cannot be written.
    """
    directory = os.fsencode(models.resolve())
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        with marker.open("a+b") as record:  # opened first: what cannot be recorded would come back once deleted
            record.seek(0)
            recorded = record.read()
            if directory in recorded.split(b"\n"):
                return False
            seeded = not any(walk(models))
            if seeded:
                _write_demo(models)
            if seeded or manifest_path(models, DEMO).is_file():  # the latter: killed before it could record
                torn = b"" if recorded.endswith(b"\n") or not recorded else b"\n"
                record.write(torn + directory + b"\n")
                record.flush()
                os.fsync(record.fileno())
            return seeded
    except OSError as error:
        raise StoreNotWritable(f"cannot record in {marker} that {models} has the demo: {error.strerror}") from error


def _write_demo(models: Path) -> None:
    weights = (files("engines.store") / "demo" / "demo.gguf").read_bytes()
    weights_digest = write_blob(models, weights)
    header = read_header(blob_path(models, weights_digest), arrays=False)
    config = encode_json(
        ModelConfig(
            model_format="gguf",
            model_family=header.architecture,
            model_families=(header.architecture,),
            model_type=header.parameter_size,
            file_type=header.file_type,
            architecture="amd64",  # what Ollama writes everywhere
            os="linux",
        )
    )
    manifest = Manifest(
        config=Layer(CONFIG_TYPE, write_blob(models, config), len(config)),
        layers=(Layer(f"{LAYER_TYPE}model", weights_digest, len(weights)),),
    )
    write_manifest(models, DEMO, manifest)
