"""kill -9 during a pull: the library is whole afterwards, and the next pull goes on with the bytes that are there."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from molora.hub.remote import pull
from molora.hub.store import Hub
from tests.adapters import WEIGHTS, change_config
from tests.hub.hub_server import Fault, HubServer, client, go_online, sha256
from tests.test_interchange import peft_lora

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def server(monkeypatch):
    go_online(monkeypatch)
    server = HubServer()
    yield server
    server.close()
    huggingface_hub.close_session()


def test_kill_during_pull_leaves_the_library_whole(tmp_path, server):
    """kill -9 in the middle of a slow download, then a pull that goes on from the bytes that are there."""
    lora = peft_lora(tmp_path / "news", 1)
    big = shutil.copytree(lora, tmp_path / "big")
    weights = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{n}.weight": torch.randn(s)
               for n, s in (("A", (512, 512)), ("B", (512, 512)))}  # fmt: skip
    save_file(weights, big / WEIGHTS, {"format": "pt"})
    change_config(big, r=512, target_modules=["q_proj"])
    server.commit_folder("me/big", big)
    slow = Fault("/cdn/", pause=0.004)
    server.faults.append(slow)
    hub = Hub(tmp_path / "library")
    hub.add(lora, "old")
    code = (
        "import sys\nfrom molora.hub.remote import pull\nfrom molora.hub.store import Hub\nprint('go', flush=True)\n"
        "pull('me/big', Hub(sys.argv[1]), endpoint=sys.argv[2], cache_dir=sys.argv[3], hosts=[sys.argv[4]])\n"
    )
    command = [sys.executable, "-c", code, str(hub.root), server.url, str(tmp_path / "cache")]
    command.append(server.cdn.removeprefix("http://"))
    gone = ("HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy")
    env = {key: value for key, value in os.environ.items() if key not in gone} | {"HF_HOME": str(tmp_path / "hf")}
    size = (big / WEIGHTS).stat().st_size

    def part():
        return sum(path.stat().st_size for path in (tmp_path / "cache").glob(f"*/files/{WEIGHTS}.part"))

    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while part() == 0 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[0]
    kept = part()
    assert process.returncode == -signal.SIGKILL and 0 < kept < size, said
    assert [str(entry.ref) for entry in hub.list()] == ["old@1"] and not any(hub.verify().values())
    server.faults.clear()
    server.log.clear()
    web = client(server)
    got = pull("me/big", hub, web=web, cache_dir=tmp_path / "cache")
    assert [headers.get("range") for _, _, headers in server.asked("/cdn/")] == [f"bytes={kept}-"]
    assert hashlib.sha256((got.entry.folder / WEIGHTS).read_bytes()).hexdigest() == sha256((big / WEIGHTS).read_bytes())
    assert not any(hub.verify().values())
