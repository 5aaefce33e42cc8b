"""medfl: federated learning that hospitals run."""

__version__ = "0.1.0"

__all__ = ["__version__"]
