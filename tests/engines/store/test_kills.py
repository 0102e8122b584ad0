"""A pull that is killed at any instant leaves the old model or the new one, and never half of either.

`HEADWATER_TEST_KILLS=50` makes it 50 kills instead of a few.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from registries import MB, digest_of, docker_registry, install, needs_registry, pulled, pushed, transfers

from engines.store.blobs import blob_path
from engines.store.manifests import manifest_path, read_manifest
from engines.store.names import ModelName

pytestmark = needs_registry

NUM_KILLS = int(os.environ.get("HEADWATER_TEST_KILLS", "4"))

PULL = """
import asyncio, sys
from pathlib import Path
from registries import pulled, transfers
from engines.store.names import ModelName

async def main(root, host):
    async with transfers(Path(root)) as mine:
        print("ready", flush=True)
        await pulled(mine, ModelName(host, "library", "m", "latest"))
        print("done", flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


def killed_pull(root: Path, host: str, after_s: float) -> None:
    """Pull in a process of its own, which is killed so long after it has begun, or when it is done."""
    paths = os.pathsep.join(
        [str(Path(__file__).parent), str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
    )
    child = subprocess.Popen(
        [sys.executable, "-c", PULL, str(root), host],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
        text=True,
    )
    assert child.stdout
    assert child.stdout.readline() == "ready\n"
    time.sleep(after_s)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()


def check_store(models: Path, name: ModelName, allowed: list[bytes]) -> None:
    """Everything visible is whole: the model is one of those manifests, or not there, and blobs are what they say."""
    if manifest_path(models, name).exists():
        assert manifest_path(models, name).read_bytes() in allowed
        manifest, _ = read_manifest(models, name)
        for layer in (*manifest.layers, manifest.config):
            assert blob_path(models, layer.digest).stat().st_size == layer.size
    for path in (models / "blobs").glob("sha256-*"):
        if len(path.name) == len("sha256-") + 64:
            assert digest_of(path.read_bytes()) == path.name.replace("-", ":")


async def test_a_killed_pull_leaves_the_old_model_or_the_new(tmp_path: Path) -> None:
    """Whatever the instant; and the next pull ends well."""
    chance = random.Random(NUM_KILLS)
    with docker_registry(tmp_path / "registry") as host:
        name = ModelName(host, "library", "m", "latest")
        here, there = tmp_path / "here", tmp_path / "there"
        allowed: list[bytes] = []
        async with transfers(here) as mine, transfers(there) as theirs:
            (there / "models" / "blobs").mkdir(parents=True)
            for version in range(NUM_KILLS):
                install(here / "models", name, chance.randbytes(24 * MB), b"licence", str(version).encode())
                await pushed(mine, name)
                allowed.append(manifest_path(here / "models", name).read_bytes())
                killed_pull(there, host, chance.uniform(0, 0.5))
                check_store(there / "models", name, allowed)
                if version % 2:  # otherwise the next version finds what the killed pull left
                    assert (await pulled(theirs, name))[-1].status == "success"
                    check_store(there / "models", name, allowed[-1:])
                    allowed = allowed[-1:]
