"""One model at a time: references, families, adapters, collation, training, vLLM engines."""
