"""The paged, continuously batching engine of prefill and decode workers."""
