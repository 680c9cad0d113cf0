"""`penstock make-model`: a random-weight model directory of about the wanted size, for benchmarks."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.errors import SettingsError

_UNITS = {"k": 10**3, "m": 10**6, "b": 10**9}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="penstock make-model", description=__doc__.strip(), allow_abbrev=False)
    parser.add_argument("--params", default="100m", help="parameters, such as 500k, 100m or 1.5b (default: 100m)")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to write; its name is the model's name")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: 0)")
    given = parser.parse_args(argv)
    out = Path(given.out).expanduser().resolve()
    params = parse_count(given.params)
    if out.exists() and any(out.iterdir()):
        raise SettingsError(f"out = {str(out)!r}: not empty; name a new directory")
    from services.cli.make_model import make_model

    made = make_model(params=params, out=out, seed=given.seed)
    print(f"{made:,} parameters in {out}. Serve them with: penstock up --model {out}")
    return 0


def parse_count(text: str) -> int:
    """`100m` -> 100000000."""
    number, unit = (text[:-1], _UNITS.get(text[-1:].lower())) if text[-1:].isalpha() else (text, 1)
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if unit is None or not 0 < value < float("inf"):
        raise SettingsError(f"params = {text!r}: expected a count such as 500k, 100m or 1.5b")
    return round(value * unit)
