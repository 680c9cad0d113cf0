"""Settings: precedence, and errors that name the key."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest
from msgspec import Meta

from common.errors import SettingsError
from common.settings import load, shown


class Demo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    model: Annotated[str, Meta(description="model directory")]
    port: Annotated[int, Meta(ge=0, le=65535, description="port")] = 8080
    dtype: Literal["auto", "float32"] = "auto"
    sync: bool = True
    peers: tuple[str, ...] = ()
    limit: Annotated[int, Meta(ge=1)] | None = None
    api_key: str = ""


def test_a_flag_beats_the_file_which_beats_the_variable_which_beats_the_default(tmp_path: Path) -> None:
    config = tmp_path / "penstock.toml"
    config.write_text('[decode]\nmodel = "file"\nport = 2\n[router]\nport = 9\n')
    environ = {
        "PENSTOCK_DECODE_MODEL": "env",
        "PENSTOCK_DECODE_PORT": "1",
        "PENSTOCK_DECODE_SYNC": "false",
        "PENSTOCK_ROUTER_PORT": "7",
    }
    settings = load(Demo, "decode", ["--config", str(config), "--port", "3"], environ)
    assert settings == Demo(model="file", port=3, sync=False)


def test_lists_and_booleans_are_read_from_flags_and_variables() -> None:
    settings = load(Demo, "decode", ["--model", "m", "--peers", "a:1, b:2", "--no-sync", "--limit", "4"], {})
    assert settings == Demo(model="m", peers=("a:1", "b:2"), sync=False, limit=4)
    assert load(Demo, "decode", ["--model", "m"], {"PENSTOCK_DECODE_PEERS": "a:1,b:2"}).peers == ("a:1", "b:2")
    assert load(Demo, "decode", ["--model", "m", "--peers", "a:1", "--peers", "b:2"], {}).peers == ("a:1", "b:2")


def test_a_list_of_one_needs_no_brackets_in_the_file(tmp_path: Path) -> None:
    config = tmp_path / "penstock.toml"
    for text in ('peers = "a:1"', 'peers = ["a:1"]'):
        config.write_text(f'[decode]\nmodel = "m"\n{text}\n')
        assert load(Demo, "decode", ["--config", str(config)], {}).peers == ("a:1",)


@pytest.mark.parametrize(
    ("argv", "environ", "message"),
    [
        (["--model", "m", "--port", "70000"], {}, r"port = '70000'.*65535"),
        (["--model", "m", "--port", "many"], {}, r"port = 'many'"),
        (["--model", "m", "--dtype", "int3"], {}, r"dtype = 'int3'"),
        (["--model", "m"], {"PENSTOCK_DECODE_PROT": "1"}, r"PENSTOCK_DECODE_PROT.*did you mean 'port'"),
        (["--model", "m"], {"PENSTOCK_DECOED_PORT": "1"}, r"PENSTOCK_DECOED_PORT"),
        ([], {}, r"model"),
        (["--config", "/does/not/exist.toml"], {}, r"exist.toml"),
    ],
)
def test_what_can_not_be_used_stops_the_start_and_is_named(argv: list[str], environ: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load(Demo, "decode", argv, environ)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[decode]\nprot = 1", r"unknown key 'prot' in \[decode\] \(did you mean 'port'"),
        ("[decoder]\nport = 1", r"unknown key 'decoder' \(did you mean 'decode'"),
        ("port = 1", r"unknown key 'port'"),
        ("[decode", r"penstock.toml"),
    ],
)
def test_an_unusable_file_names_the_key(tmp_path: Path, text: str, message: str) -> None:
    config = tmp_path / "penstock.toml"
    config.write_text(text)
    with pytest.raises(SettingsError, match=message):
        load(Demo, "decode", ["--model", "m", "--config", str(config)], {})


def test_help_names_every_key_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(Demo, "decode", ["--help"], {})
    text = capsys.readouterr().out
    for flag in ("--model", "--port", "--dtype", "--sync", "--peers", "--config", "PENSTOCK_DECODE_", "8080", "(required)"):
        assert flag in text


def test_secrets_are_masked_when_shown() -> None:
    assert shown(Demo(model="m", api_key="s3cret"))["api_key"] == "***"
