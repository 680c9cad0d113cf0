"""What one training run is told on its command line."""

import argparse
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HIDDEN_FROM_THE_CARD = frozenset({"out", "work", "library", "prepare_only", "device", "continue_from", "evaluate_every"})


@dataclass(frozen=True)
class Plan:
    out: Path
    work: Path
    library: Path
    prepare_only: bool
    continue_from: Path | None
    steps: int
    minutes: float
    device: str
    seed: int
    compile: bool
    tokens_per_step: int
    row_tokens: tuple[int, ...]
    optimiser: str
    learning_rate: float
    decay_share: float
    weight_decay: float
    dropout: float
    repeat_share: float
    evaluate_every: int

    def for_the_card(self) -> dict[str, Any]:
        """The settings another run needs to be like this one, in JSON's types."""
        shown = {name: value for name, value in vars(self).items() if name not in HIDDEN_FROM_THE_CARD and value != float("inf")}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in shown.items()}


def parse(description: str, arguments: list[str] | None = None) -> Plan:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.demo_model.train", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="where the Hugging Face directory is written")
    add("--work", type=Path, help="corpus and tokenizer are kept here, and taken from here if they are there (default: OUT.work)")
    add(
        "--library",
        type=Path,
        default=Path(sysconfig.get_path("stdlib")),
        help="folder of Python source (default here: %(default)s)",
    )
    add("--prepare-only", action="store_true", help="make corpus and tokenizer in --work and stop")
    add("--continue-from", type=Path, help="start from an earlier run's --out, not from random weights; give the same --work")
    add("--steps", type=int, default=900, help="optimiser steps (default: %(default)s)")
    add(
        "--minutes",
        type=float,
        default=float("inf"),
        help="end after so many minutes, if --steps takes longer; compiling not counted",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default here: %(default)s)")
    add("--seed", type=int, default=0, help="of corpus wording, weights and order (default: %(default)s)")
    add("--compile", action="store_true", help="torch.compile: a minute or more at the start, faster steps on CUDA")
    add("--tokens-per-step", type=int, default=131_072, help="batch size, a multiple of each row length (default: %(default)s)")
    add("--row-tokens", type=int, nargs="+", default=[8192, 2048], help="row lengths, taken in turn (default: 8192 2048)")
    add(
        "--optimiser",
        choices=("adamw", "muon"),
        help="for the layers' matrices (default: muon on cuda, adamw on cpu, where muon is slow)",
    )
    add("--learning-rate", type=float, default=2e-3, help="peak (default: %(default)s)")
    add(
        "--decay-share",
        type=float,
        default=0.6,
        help="last share of the run, in which the rate falls to zero (default: %(default)s)",
    )
    add("--weight-decay", type=float, default=0.1, help="default: %(default)s")
    add("--dropout", type=float, default=0.1, help="default: %(default)s")
    add(
        "--repeat-share",
        type=float,
        default=0.4,
        help="share of the rows in which a passage comes twice, to learn copying (default: %(default)s)",
    )
    add("--evaluate-every", type=int, default=100, help="steps between looks at held-out text (default: %(default)s)")
    given = vars(parser.parse_args(arguments))
    given["row_tokens"] = tuple(given["row_tokens"])
    given["work"] = given["work"] or given["out"].with_name(given["out"].name + ".work")
    given["optimiser"] = given["optimiser"] or ("muon" if given["device"].startswith("cuda") else "adamw")
    if any(given["tokens_per_step"] % length for length in given["row_tokens"]):
        parser.error(
            f"--tokens-per-step {given['tokens_per_step']} is not a multiple of every --row-tokens {given['row_tokens']}"
        )
    if not 0 < given["decay_share"] <= 1:
        parser.error(f"--decay-share {given['decay_share']} is not above 0 and at most 1")
    return Plan(**given)
