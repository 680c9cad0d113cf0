"""Finding a capacity with few trials. Pure."""

from collections.abc import Callable

RATIO = 1.25  # between neighbouring trials; the last one halves it
TRIALS_MAX = 8


def capacity(passes: Callable[[float], bool], guess: float) -> float:
    """The highest rate found to pass, within about `sqrt(RATIO)`; 0 when none of `TRIALS_MAX` did.

    Goes up from `guess` while trials pass, or down until one does, and tries once more between the last pass and the first failure.
    """
    rate, best, worst = guess, 0.0, float("inf")
    for _ in range(TRIALS_MAX - 1):
        if passes(rate):
            best = rate
        else:
            worst = rate
        if best and worst < float("inf"):
            break
        rate = best * RATIO if best else worst / RATIO
    if not best or worst == float("inf"):
        return best
    between: float = (best * worst) ** 0.5
    return between if passes(between) else best
