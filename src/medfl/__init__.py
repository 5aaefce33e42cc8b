"""medfl: federated learning that hospitals run."""

import os

# Flower reports usage and looks for updates unless told otherwise before its first import; nothing
# of a hospital's machine calls out on its own.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

# grpcio has no setting for the version of TLS and reads this when it is imported. In TLS 1.2 the
# suite needs an RSA certificate and ours are P-256, so that only TLS 1.3 can be agreed on.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES256-GCM-SHA384"

# Flower's processes talk to each other on loopback; a hospital's proxy to the outside is not theirs.
_direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
if not {"127.0.0.1", "*"} & {name.strip() for name in _direct.split(",")}:
    os.environ["no_proxy"] = f"{_direct},127.0.0.1".lstrip(",")

__version__ = "0.1.0"

__all__ = ["__version__"]
