"""Made-up stores."""

from report_fakes import attention_store, drift, full_store, make

__all__ = ["attention_store", "drift", "full_store", "make"]
