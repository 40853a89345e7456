"""Mixed precision, teacher-only distillation, LoRA and quantization, from fp32 down to 2 bits."""
