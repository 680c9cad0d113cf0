"""How long a step takes: a fixed part, and a part for every token. Pure.

A step of sixty tokens and one of a thousand differ by far less than their tokens: a rate of tokens over seconds is that of
whatever sizes came last. So a line is fitted, by least squares over the last steps, older ones counting less and less.

    seconds = step_s + tokens / tokens_per_s

The fixed part is no longer than the shortest step: one that the machine held up bends the line, and says nothing of it. Steps
that don't lie on a line leave its slope uncertain, the more so the less their sizes differ: a token is then reckoned dearer by
twice the slope's standard error, and at most as dear as if steps had no fixed part. So a few short steps promise no quick long ones.
While all steps are about alike there is no line to see: the fixed part stays what it was, and the rest is the tokens'.
"""

import math

DECAY = 0.95  # of a step's weight with every later one: about the last twenty count
SPREAD_MIN = 0.1  # standard deviation over mean of the tokens, below which steps are alike
FORGET = 1.02  # the shortest step of late grows by so much with every later one
ERRORS = 2.0  # standard errors of the slope that a token is reckoned dearer by
GAIN_MAX = 8.0  # tokens are at most so much quicker than tokens over seconds says: a bad fit is bounded


class Speed:
    """Of one engine.

    Attributes:
        tokens_per_s: of one more token; 0 until measured.
        step_s: of a step that computes next to nothing.
    """

    def __init__(self) -> None:
        self.tokens_per_s = 0.0
        self.step_s = 0.0
        self._shortest_s = math.inf  # of late
        self._weight = 0.0
        self._tokens = self._seconds = 0.0  # weighted means
        self._tokens_variance = self._seconds_variance = self._covariance = 0.0  # weighted, not divided by the weight

    def __repr__(self) -> str:
        return f"Speed({1000 * self.step_s:.1f} ms + tokens / {self.tokens_per_s:.0f} per s)"

    def measured(self, tokens: float, seconds: float) -> None:
        """A step computed so many tokens in so long."""
        assert tokens > 0
        seconds = max(seconds, 1e-6)
        self._shortest_s = min(self._shortest_s * FORGET, seconds)
        self._weight = self._weight * DECAY + 1.0
        from_tokens, from_seconds = tokens - self._tokens, seconds - self._seconds
        self._tokens += from_tokens / self._weight
        self._seconds += from_seconds / self._weight
        self._tokens_variance = self._tokens_variance * DECAY + from_tokens * (tokens - self._tokens)
        self._seconds_variance = self._seconds_variance * DECAY + from_seconds * (seconds - self._seconds)
        self._covariance = self._covariance * DECAY + from_tokens * (seconds - self._seconds)
        self._fit()

    def _fit(self) -> None:
        variance, mean_s = self._tokens_variance / self._weight, self._seconds / self._tokens
        if variance >= (SPREAD_MIN * self._tokens) ** 2:
            slope_s = self._covariance / self._tokens_variance + ERRORS * self._slope_error_s()
            self.step_s = self._seconds - min(slope_s, mean_s) * self._tokens
        self.step_s = max(0.0, min(self.step_s, self._shortest_s))
        per_token_s = max(mean_s / GAIN_MAX, (self._seconds - self.step_s) / self._tokens)
        self.tokens_per_s = 1.0 / per_token_s
        self.step_s = max(0.0, self._seconds - per_token_s * self._tokens)

    def _slope_error_s(self) -> float:
        """Standard error of the line's slope: two parameters leave so many of the steps to tell it."""
        beside_line = max(0.0, self._seconds_variance - self._covariance**2 / self._tokens_variance)
        spare = self._weight - 2.0
        return math.sqrt(beside_line / spare / self._tokens_variance) if spare > 0 else math.inf
