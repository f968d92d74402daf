"""The report: one self-contained HTML file made from a study's store.

The report computes nothing but means and standard deviations over seeds, differences and correlations of stored
metrics, and shares of stored histogram counts.
"""

from quantlens.report.build import write_report

__all__ = ["write_report"]
