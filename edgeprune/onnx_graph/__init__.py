"""ONNX graphs without torch: passes, precision, matrix products, attention fusion."""
