"""The yardstick: `transformers.generate` in a process of its own, driven by JSON lines.

Reads one command a line on stdin, answers one line on stdout:
    {"op": "generate", "prompt": [ids], "new_tokens": 64} -> {"seconds": 1.2, "first_s": 0.1, "tokens": [ids]}
    {"op": "memory"} -> {"peak_bytes": 123}
It ends when stdin does. `first_s` is the time to the first token (a streamer sees it).
"""

import argparse
import json
import resource
import sys
import time
from typing import Any


class FirstToken:
    """A streamer that notes when the first generated token appears."""

    def __init__(self) -> None:
        self.calls = 0
        self.at = 0.0

    def put(self, value: Any) -> None:
        self.calls += 1
        if self.calls == 2:  # the first call is the prompt
            self.at = time.perf_counter()

    def end(self) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description="transformers.generate behind JSON lines on stdin and stdout")
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).eval()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if command["op"] == "memory":
            answer: dict[str, Any] = {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        else:
            answer = _generate(model, command["prompt"], command["new_tokens"])
        print(json.dumps(answer), flush=True)


def _generate(model: Any, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    import torch

    ids = torch.tensor([prompt])
    streamer = FirstToken()
    began = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=streamer,
        )
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "first_s": streamer.at - began, "tokens": out[0, len(prompt) :].tolist()}


if __name__ == "__main__":
    main()
