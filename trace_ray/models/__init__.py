"""One model at a time: references, families, adapters, collation, training, vLLM engines."""

import logging

# peft imports bitsandbytes where it is installed, which misses an optional kernel on some CPUs, each time.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
