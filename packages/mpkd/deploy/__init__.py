"""The student for other runtimes: its grids in ONNX, OpenVINO, TensorRT, and what opens them."""
