"""The student for other runtimes: ONNX, int8 with Q/DQ nodes, OpenVINO, TensorRT."""
