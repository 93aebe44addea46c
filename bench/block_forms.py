"""The four forms of the block's kernel, and the least memory traffic of each. Without torch."""

FORMS = ("forward", "backward", "jvp", "backward_jvp")
BYTES = {"f32": 4, "f64": 8, "bf16": 2, "f16": 2}


def minimum_bytes(form: str, scalar: str, shape: tuple[int, int, int, int]) -> int:
    N, C, H, W = shape
    x, y = N * C * H * W, N * C * (H // 2) * (W // 2)
    images = {"forward": x + y, "backward": 2 * x + y, "jvp": 2 * x + y, "backward_jvp": 3 * x + 3 * y}
    shares = 2 * N * C if "backward" in form else 0
    return images[form] * BYTES[scalar] + shares * (8 if scalar == "f64" else 4)
