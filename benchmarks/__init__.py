"""What measures speed and memory; `results/` holds what was measured, `docs/performance.md` shows it."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
METHOD_FLAGS = {
    "full": [],
    "frozen": ["--freeze_vision_model"],
    "lora": ["--use_lora", "--lora_rank", "32"],
    "qlora": ["--use_qlora", "--lora_rank", "32"],
}
