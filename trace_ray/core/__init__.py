"""Pure maths and rules: no Ray, vLLM, MLflow, transformers or I/O."""
