"""Finding a capacity with few trials. Pure."""

from collections.abc import Callable

RATIO = 1.25  # between neighbouring trials
BISECTIONS = 2  # after that: to within RATIO ** 0.25
TRIALS_MAX = 9


def capacity(passes: Callable[[float], bool], guess: float) -> float:
    """The highest rate found to pass, within about `RATIO ** 0.25`; 0 when none of `TRIALS_MAX` did.

    Goes up from `guess` while trials pass, or down until one does, and then halves the way between the last pass and the first failure.
    """
    rate, best, worst = guess, 0.0, float("inf")
    for _ in range(TRIALS_MAX - BISECTIONS):
        if passes(rate):
            best = rate
        else:
            worst = rate
        if best and worst < float("inf"):
            break
        rate = best * RATIO if best else worst / RATIO
    if not best or worst == float("inf"):
        return best
    for _ in range(BISECTIONS):
        between: float = (best * worst) ** 0.5
        if passes(between):
            best = between
        else:
            worst = between
    return best
