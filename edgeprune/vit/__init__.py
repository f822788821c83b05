"""Everything that needs torch: models, families, reducers, the pruned model, its fidelity and its ONNX export."""
