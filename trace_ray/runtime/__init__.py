"""The thin distributed layer: Ray, vLLM actors, MLflow and storage."""
