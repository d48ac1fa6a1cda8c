"""--push_to_hub, with a local server in place of the Hub."""

import base64
import json
import os
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from forked import be_process, run_script
from runs import flags


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


def be_process_online(address, *arguments):
    """One process of a run for which the Hub is at this address."""
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    huggingface_hub.constants.ENDPOINT = huggingface_hub.hf_api.api.endpoint = address
    os.environ |= {"HF_TOKEN": "hf_none"}
    be_process(*arguments, whole=True)


@pytest.mark.slow
def test_push_to_hub(hub, random_model, docvqa_data, tmp_path):
    """One repository is created, and its only commit is the finished run, without checkpoints and images of the dataset.

    The card has the name with which the model is loaded, although the flag leaves the user out.
    """
    options = {"max_steps": 1, "use_lora": True, "push_to_hub": True, "hub_model_id": "tiny", "hub_private_repo": True}
    options |= {"model_name_or_path": random_model, "save_strategy": "steps", "save_steps": 1}
    output = tmp_path / "run"
    (output / "gallery").mkdir(parents=True)
    (output / "gallery/of an earlier run.jpg").write_bytes(b"")
    words, log = flags(docvqa_data, output, **options, dataloader_num_workers=0), tmp_path / "log"
    codes = run_script(words, log, processes=1, target=partial(be_process_online, hub.address))
    assert codes == [0], log.read_text()[-4000:]
    assert [(repository["name"], repository["visibility"]) for repository in hub.created] == [("tiny", "private")]
    [pushed] = hub.commits
    assert "from_pretrained('someone/tiny'" in (output / "README.md").read_text()
    model = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}
    assert pushed.keys() >= model | {"README.md", "run.json", "eval_after.json"}
    assert (output / "report.html").is_file()
    assert not any(name.startswith(("checkpoint-", "gallery", "report")) for name in pushed)
    for name in ("adapter_model.safetensors", "README.md"):
        assert base64.b64decode(pushed[name]["content"]) == (output / name).read_bytes()
