"""Finding a capacity with few trials. Pure."""

from collections.abc import Callable

TRIALS_MAX = 9


def capacity(passes: Callable[[float], bool], guess: float, *, ratio: float, bisections: int) -> float:
    """The highest rate found to pass, within about `ratio ** 0.5 ** bisections`; 0 when none of `TRIALS_MAX` did.

    Goes up from `guess` in steps of `ratio` while trials pass, or down until one does, and then halves the way between the last pass and the
    first failure so many times.
    """
    rate, best, worst = guess, 0.0, float("inf")
    for _ in range(TRIALS_MAX - bisections):
        if passes(rate):
            best = rate
        else:
            worst = rate
        if best and worst < float("inf"):
            break
        rate = best * ratio if best else worst / ratio
    if not best or worst == float("inf"):
        return best
    for _ in range(bisections):
        between: float = (best * worst) ** 0.5
        if passes(between):
            best = between
        else:
            worst = between
    return best
