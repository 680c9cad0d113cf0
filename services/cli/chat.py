"""`penstock chat`: a conversation in the terminal over the HTTP API, with what each turn cost.

After every turn: TTFT as seen from here, speed, how many of the prompt's tokens were cached, and
which route the router took. Ctrl-C stops a turn (which cancels it in the cluster), Ctrl-D or /exit
leaves, /reset forgets the conversation.
"""

import argparse
import os
import signal
import sys
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from common.errors import PenstockError
from services.cli import state
from services.cli.chat_client import ChatClient, Message, Options, Turn

DEFAULT_URL = "http://127.0.0.1:8080"
_HELP = "/reset forgets the conversation, /exit leaves, Ctrl-C stops an answer"


def main(argv: Sequence[str]) -> int:
    given = _parser().parse_args(argv)
    url = given.url or _url_of(Path(given.data).expanduser().resolve()) or DEFAULT_URL
    options = Options(max_tokens=given.max_tokens, temperature=given.temperature)
    with suppress(ImportError):
        import readline  # noqa: F401  (line editing and history in input())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    with ChatClient(url, given.model, given.api_key, options) as client:
        print(f"{client.model} at {url}   ({_HELP})\n")
        return converse(client, given.system)


def converse(client: ChatClient, system: str) -> int:
    """Turns until the user leaves."""
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("\n(/exit leaves)")
            continue
        if text in ("/exit", "/quit"):
            return 0
        if text == "/reset":
            messages = list(opening)
            print("(forgotten)\n")
        elif text.startswith("/"):
            print(f"({_HELP})\n")
        elif text:
            messages = _turn(client, [*messages, {"role": "user", "content": text}])


def _turn(client: ChatClient, messages: list[Message]) -> list[Message]:
    """One answer, printed as it comes; the conversation after it (what was said until a Ctrl-C counts)."""
    turn = Turn()
    try:
        for piece in client.stream(messages, turn):
            print(printable(piece), end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except PenstockError as error:
        print(f"[{error.message}]\n", file=sys.stderr)
        return messages[:-1]
    print(f"\n{_dim(turn.in_words())}\n")
    return [*messages, {"role": "assistant", "content": turn.text}]


def printable(text: str) -> str:
    """Without control characters: what a model says must not steer the terminal."""
    return "".join(char if char in "\n\t" or unicodedata.category(char) != "Cc" else "\ufffd" for char in text)


def _dim(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m" if sys.stdout.isatty() else text


def _url_of(data: Path) -> str:
    cluster = state.read(data)
    return cluster.url if cluster is not None and state.alive(cluster.launcher) else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="penstock chat", description=__doc__.partition("\n")[0], epilog=_HELP, allow_abbrev=False
    )
    parser.add_argument("--url", default="", help=f"the router (default: the one of --data, else {DEFAULT_URL})")
    parser.add_argument("--data", default="data", metavar="DIR", help="data folder of a cluster on this machine (default: data)")
    parser.add_argument("--model", default="", help="model name (default: the one that is served)")
    parser.add_argument("--system", default="", help="system prompt")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest answer (default: 512)")
    parser.add_argument("--temperature", type=float, default=None, help="sampling temperature (default: the model's)")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", ""), help="API key (default: OPENAI_API_KEY)")
    return parser
