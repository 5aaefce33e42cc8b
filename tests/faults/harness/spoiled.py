"""A medfl command with something broken in it: python spoiled.py server|client|trainer JSON ARGV...

The command itself is the installed one, with its own keys; JSON names what is replaced before it
starts ({spoil: argument}), so that a fault comes at an exact moment and the product has no hooks
for it. The spoils are the functions of `spoils.py` beside this file.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path


def main() -> int:
    module, text, *argv = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    spoils = importlib.import_module("harness.spoils")
    wanted = json.loads(text)
    # First: what reads the clock binds it when it is imported.
    for name in sorted(wanted, key=lambda n: n != "clock"):
        getattr(spoils, name)(wanted[name])
    sys.argv = [module, *argv]
    if module == "trainer":
        return int(importlib.import_module("medfl.client.trainer").main())
    return int(importlib.import_module(f"medfl.{module}.cli").main(argv))


if __name__ == "__main__":
    raise SystemExit(main())
