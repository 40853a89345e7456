"""The model folder: written, checked against its network, quantized, asked, judged and served.

What every project does with a finished network belongs here, in NumPy and ONNX alone. Forms that
one framework reads (checkpoints, Paddle Inference, ``torch.export``) are the projects'.
"""
