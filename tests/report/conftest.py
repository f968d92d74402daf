"""Made-up stores."""

from report_fakes import attention_store, drift, full_store, make, small_store

__all__ = ["attention_store", "drift", "full_store", "make", "small_store"]
