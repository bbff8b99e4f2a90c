"""Object removal (engine ``onnx``): holes found, each painted by one ONNX graph, and laid in."""
