"""The modes of the ablation: one build, the same processes; only what the router's policy may use differs."""

import msgspec


class Mode(msgspec.Struct, frozen=True):
    """`router` are the router's flags; `workers` is empty but for the oracle."""

    name: str
    about: str
    router: tuple[str, ...]
    workers: tuple[str, ...] = ()


MODES = {
    mode.name: mode
    for mode in (
        Mode("basic", "prefill loads the whole prefix, then computes; workers in turn", ("--direct-tail-tokens", "0")),
        Mode("direct", "decode loads the whole prefix and computes the tail", ("--direct-tail-tokens", "16384")),
    )
}
ABLATION = ("basic", "direct")
ONLINE_MODES = ("basic", "direct")
ONE_REQUEST_MODES = ("basic", "direct")
CROSSING_MODES = ("basic", "direct")
