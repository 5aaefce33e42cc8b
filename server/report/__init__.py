"""The report that a person reads, and the model card, from the files of a finished run."""

from medfl.server.report.write import write_report

__all__ = ["write_report"]
