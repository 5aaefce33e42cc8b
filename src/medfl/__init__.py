"""medfl: federated learning that hospitals run."""

import os

# Flower reports usage and looks for updates unless told otherwise before its first import; nothing
# of a hospital's machine calls out on its own.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

__version__ = "0.1.0"

__all__ = ["__version__"]
