"""Streams a completion from an OpenAI-compatible server and says what speculation gained.

    python examples/serving/client.py --prompt "def read(path):"

Standard library only. The counters are those of vLLM's ``/metrics``; they are the server's, so they hold what other
clients caused meanwhile.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import urllib.request
from collections.abc import Iterator

_COUNTER = re.compile(r"^vllm:spec_decode_num_(\w+?)_total(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_POSITION = re.compile(r'position="(\d+)"')


def counters(url: str) -> dict[str, float]:
    """The speculation counters: drafts, draft_tokens, accepted_tokens, and accepted_tokens_per_pos[i]."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
        text = reply.read().decode()
    found: dict[str, float] = {}
    for name, labels, value in _COUNTER.findall(text):
        position = _POSITION.search(labels)
        key = f"{name}[{position[1]}]" if position else name
        found[key] = found.get(key, 0.0) + float(value)
    return found


def stream(url: str, prompt: str, max_tokens: int) -> Iterator[str]:
    """Pieces of the completion as they come."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as reply:
        for line in reply:
            event = line.decode().strip().removeprefix("data: ")
            if event and event != "[DONE]":
                yield json.loads(event)["choices"][0]["text"]


def main() -> int:
    """Stream, then print the difference of the counters."""
    parser = argparse.ArgumentParser(description="Stream a completion and read the acceptance counters.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-tokens", type=int, default=64, help="new tokens at most (default: %(default)s)")
    args = parser.parse_args()
    before, began = counters(args.url), time.perf_counter()
    for piece in stream(args.url, args.prompt, args.max_tokens):
        print(piece, end="", flush=True)
    seconds = time.perf_counter() - began
    after = counters(args.url)
    gained = {key: value - before.get(key, 0.0) for key, value in after.items()}
    print(f"\n\n{seconds:.2f} s", file=sys.stderr)
    drafts = gained.get("drafts", 0.0)
    if not drafts:
        print("no drafts: the server does not speculate", file=sys.stderr)
        return 0
    print(f"{1 + gained['accepted_tokens'] / drafts:.2f} tokens per forward pass", file=sys.stderr)
    for position in range(len([key for key in gained if key.startswith("accepted_tokens_per_pos[")])):
        accepted = gained[f"accepted_tokens_per_pos[{position}]"]
        print(f"head {position + 2}: {accepted:.0f} of {drafts:.0f} drafts accepted", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
