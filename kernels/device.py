"""Says where a kernel can run, and which generation of GPU its block sizes are for."""

import torch
import triton

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _kernel():
    """Does nothing. Its type tells how this process runs kernels."""


def is_interpreted() -> bool:
    """Says whether `TRITON_INTERPRET=1` runs the kernels in Python on CPU tensors, as tests do."""
    return not isinstance(_kernel, triton.JITFunction)


def architecture(device: torch.device) -> int:
    """Returns the generation whose block sizes fit the device: 80 (Ampere, Ada) or 90 (Hopper).

    The interpreter takes the sizes of 80. So do later generations, whose own are not measured: they
    have the shared memory and the instructions that 80 asks for. PyTorch calls an AMD GPU "cuda"
    too, but its numbers mean other things: an MI200 is 9.0, like Hopper, and has no TMA.
    """
    if device.type != "cuda" or torch.version.hip:
        return 80
    gpu = torch.cuda.get_device_properties(device)
    return 90 if (gpu.major, gpu.minor) == (9, 0) else 80


def cannot_run(device: torch.device, dtype: torch.dtype, size: int = 0) -> str | None:
    """Returns why no Triton kernel, of any size, can take this device and dtype, or None."""
    if dtype not in FLOATS:
        return f"dtype {str(dtype).removeprefix('torch.')} is not one of float32, float16, bfloat16"
    if is_interpreted():
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly"
        return None if device.type == "cpu" else f"device {device.type} under TRITON_INTERPRET=1"
    if device.type != "cuda":
        return f"device is {device.type}, not cuda"
    if torch.version.hip or not torch.cuda.is_available():
        # AMD's numbers are no compute capabilities. Without a GPU, one elsewhere is planned for.
        return None
    # Not get_device_capability: torch.compile takes this one for a constant.
    gpu = torch.cuda.get_device_properties(device)
    return None if gpu.major >= 8 else f"compute capability {gpu.major}.{gpu.minor} is below 8.0"
