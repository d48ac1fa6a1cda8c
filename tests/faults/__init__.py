"""Faults and load; see docs/reliability.md. Start reading at :mod:`faults.faults`."""
