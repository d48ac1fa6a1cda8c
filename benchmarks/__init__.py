"""What measures speed and memory; `results/` holds what was measured, `docs/performance.md` shows it."""
