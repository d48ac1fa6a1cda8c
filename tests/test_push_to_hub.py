"""--push_to_hub, with a local server in place of the Hub."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT
from runs import SCRIPT, flags


@pytest.fixture
def hub():
    """A local Hub: its address, and what it was sent."""

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            path = self.path.partition("?")[0]
            if path == "/api/repos/create":
                server.created.append(json.loads(body))
                answer = {"url": f"{server.address}/someone/tiny"}
            elif path.endswith("/preupload/main"):
                files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
                answer = {"files": [file | {"shouldIgnore": False} for file in files]}
            elif path == "/api/models/someone/tiny/commit/main":
                lines = [json.loads(line) for line in body.splitlines()]
                server.commits.append({line["value"]["path"]: line["value"] for line in lines if line["key"] == "file"})
                answer = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{server.address}/someone/tiny/commit/0"}
            else:
                answer = {}
            self.reply(answer)

        def do_GET(self):
            self.reply({"id": "someone/tiny", "sha": "0" * 40, "siblings": []})

        def reply(self, answer):
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.created, server.commits = [], []
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.slow
def test_push_to_hub(hub, random_model, docvqa_data, tmp_path):
    """One repository is created, and its only commit is the finished run, without checkpoints and images of the dataset.

    The card has the name with which the model is loaded, although the flag leaves the user out.
    """
    options = {"max_steps": 1, "use_lora": True, "push_to_hub": True, "hub_model_id": "tiny", "hub_private_repo": True}
    options |= {"model_name_or_path": random_model, "save_strategy": "steps", "save_steps": 1}
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery/of an earlier run.jpg").write_bytes(b"")
    words = flags(docvqa_data, tmp_path, **options, dataloader_num_workers=0)
    # huggingface_hub reads these variables when it is imported.
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_none"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, SCRIPT, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert [(repository["name"], repository["visibility"]) for repository in hub.created] == [("tiny", "private")]
    [pushed] = hub.commits
    assert "from_pretrained('someone/tiny'" in (tmp_path / "README.md").read_text()
    expected = {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
        "run.json",
        "eval_after.json",
        "tokenizer.json",
    }
    assert pushed.keys() >= expected and not any("checkpoint-" in name for name in pushed)
    sent = {name for commit in hub.commits for name in commit}
    assert (tmp_path / "report.html").is_file() and not any(name.startswith(("gallery", "report")) for name in sent)
    for name in ("adapter_model.safetensors", "README.md"):
        assert base64.b64decode(pushed[name]["content"]) == (tmp_path / name).read_bytes()
