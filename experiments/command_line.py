"""The command line and YAML file of a script, read into its frozen dataclass."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import draccus
from draccus.utils import ParsingError


def read(config_class: type, args: Sequence[str] | None = None) -> Any:
    """A `config_class` from `--config_path FILE` and `--field.name value` (default: this process's arguments).

    A field of true or false may stand alone, meaning true: `--check`. Raises: SystemExit(2), with the reason on stderr,
    for what does not parse or what a config refuses.
    """
    given = list(sys.argv[1:] if args is None else args)
    switches = {f"--{f.name}" for f in dataclasses.fields(config_class) if f.type in (bool, "bool")}
    words = []
    for at, word in enumerate(given):
        words.append(word)
        if word in switches and (at + 1 == len(given) or given[at + 1].startswith("--")):
            words.append("true")
    try:
        return draccus.parse(config_class, args=words)
    except ParsingError as error:
        reasons: list[BaseException] = [error]
        while (cause := reasons[-1].__cause__ or reasons[-1].__context__) is not None:
            reasons.append(cause)
        print(*dict.fromkeys(str(reason) for reason in reasons), sep="\n  because: ", file=sys.stderr)
        raise SystemExit(2) from error
