"""A real vLLM server as a process on this machine, and what it says of next tokens."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

PATIENCE = 400.0
"""Seconds that a start may take; on one busy core it has taken 130."""
FLAGS = (
    "--dtype=float32",
    "--max-model-len=512",
    "--max-num-seqs=8",
    "--max-logprobs=-1",
    "--enable-scale-out",
    "--enable-lora",
    "--max-lora-rank=16",
    "--max-loras=1",
    "--generation-config=vllm",
    "--enforce-eager",
)
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


class RealServer:
    """`with RealServer(interpreter, checkpoint, log) as server:` serves `checkpoint` as `student` until the block ends.

    It has what a served student and teacher need: adapters, development routes, ids in and out, log-probabilities of
    the whole vocabulary. `interpreter` is the Python of vLLM's own environment.
    """

    def __init__(self, interpreter: str, checkpoint: Path, log: Path) -> None:
        self.interpreter, self.checkpoint, self.log = interpreter, checkpoint, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=120.0)

    def __enter__(self) -> RealServer:
        command = [self.interpreter, "-m", "vllm.entrypoints.openai.api_server", f"--model={self.checkpoint}"]
        command += ["--served-model-name=student", "--host=127.0.0.1", f"--port={self.port}", *FLAGS]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=output, stderr=output)
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server and its workers."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.http.close()

    def _wait(self) -> None:
        start = time.monotonic()
        while self.process.poll() is None and time.monotonic() - start < PATIENCE:
            try:
                if self.http.get("/health").status_code == 200:
                    self.seconds_to_start = time.monotonic() - start
                    # The first completion takes ten seconds more: threads and buffers are made.
                    self.post("/v1/completions", {"model": "student", "prompt": [5], "max_tokens": 1})
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise AssertionError(f"no server after {time.monotonic() - start:.0f} s; its log ends in\n{self.end_of_log()}")

    def end_of_log(self) -> str:
        """The last lines that the server wrote."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])

    def post(self, path: str, body: Any = None) -> Any:
        """The reply as JSON (adapters answer in plain text); an error status fails the test."""
        reply = self.http.post(path, json=body)
        assert reply.status_code == 200, f"{path}: {reply.status_code} {reply.text}"
        return reply.json() if "json" in reply.headers.get("content-type", "") else reply.text

    def prompt_logprobs(self, ids: Sequence[int], vocabulary: int, model: str = "student", **options: Any) -> Tensor:
        """Log-probabilities `[len(ids) - 1, vocabulary]` of what follows `ids[:1]`, `ids[:2]`, ... Reads no cache."""
        body = {"model": model, "prompt": list(ids), "max_tokens": 1, "prompt_logprobs": -1, **options}
        rows = self.post("/v1/completions", body)["choices"][0]["prompt_logprobs"]
        assert rows[0] is None
        return torch.tensor([[row[str(i)]["logprob"] for i in range(vocabulary)] for row in rows[1:]])

    def next_logprobs(self, ids: Sequence[int], vocabulary: int, model: str = "student") -> Tensor:
        """Log-probabilities `[vocabulary]` of what follows `ids`, as generation sees them: through the prefix cache."""
        body = {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 0.0, "logprobs": -1}
        choice = self.post("/v1/completions", body | {"return_tokens_as_token_ids": True})["choices"][0]
        [said] = choice["logprobs"]["top_logprobs"]
        return torch.tensor([said[f"token_id:{i}"] for i in range(vocabulary)])

    def reload(self, folder: Path) -> None:
        """Set the weights of the checkpoint in `folder`. What the prefix cache holds stays."""
        self.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})

    def load_adapter(self, folder: Path, name: str = "policy") -> None:
        """Serve the adapter in `folder` as `name`, in place of the one before."""
        self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder), "load_inplace": True})

    def reset(self) -> None:
        """Forget the prefix cache."""
        assert self.post("/reset_prefix_cache")["success"]

    def unload_adapters(self) -> None:
        """Serve the base model alone."""
        for model in self.http.get("/v1/models").json()["data"]:
            if model["parent"]:
                self.post("/v1/unload_lora_adapter", {"lora_name": model["id"]})
