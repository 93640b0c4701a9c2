"""The oracles: float32 (float64 when x64 is on) over dequantised operands. Short, obvious, never optimised."""
