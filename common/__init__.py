"""The method: knows neither Flower nor ONNX and runs in one process."""
