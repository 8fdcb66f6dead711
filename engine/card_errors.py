"""What an exception of torch says about the card: one edge where it becomes ours."""

from schemas.errors import GpuFault, OutOfMemory, WorkerError

# Source of the words: PyTorch's CUDAException.h, ATen/cuda/Exceptions.h (the driver's own errors, which are no
# AcceleratorError) and cudnn/Conv_v8.cpp, the status names of cuBLAS and cuDNN (8 and 9), Triton's launcher.
NO_MEMORY = (
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    # A convolution for which no algorithm had room for its workspace: PyTorch drops the reason. Ours all have one.
    "unable to find an engine to execute this computation",
)
NO_MEMORY_TRITON = ("Triton Error [CUDA]", "out of memory")
FAULTS = (
    "CUDA error",
    "CUDA driver error",
    "CUBLAS_STATUS",
    "CUDNN_STATUS",
    "cuDNN error",
    "Triton Error [CUDA]",
    "device-side assert",
    "illegal memory access",
)


def card_error(error: RuntimeError) -> WorkerError | None:
    """OutOfMemory, GpuFault, or None for neither.

    A library that finds no room for its workspace says so by its own status. The context survives that; after every
    other error of the card each later call in the process fails too.
    """
    import torch

    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(words in text for words in NO_MEMORY):
        return OutOfMemory("the card ran out of memory")
    if all(words in text for words in NO_MEMORY_TRITON):
        return OutOfMemory("the card ran out of memory")
    if isinstance(error, torch.AcceleratorError) or any(words in text for words in FAULTS):
        return GpuFault("the card failed; the worker is being replaced, send the request again")
    return None
