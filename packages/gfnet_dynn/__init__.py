"""Remote-sensing scenes: GFNet, distilled, with learned early exits."""
